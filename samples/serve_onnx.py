"""Answers an HTTP request with a compressed model: nothing but onnxruntime, NumPy and Python.

    python samples/serve_onnx.py runs/model-host-cpu/model.onnx --port 8000
    curl --data-binary @image.npy http://localhost:8000/

A request is a `.npy` file of float32 in the shape of the model's input (an error says which), as
`numpy.save` writes it; the answer is JSON, one list an output.
"""

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import onnxruntime

MAX_BYTES = 64 * 2**20  # of a request


class Handler(BaseHTTPRequestHandler):
    """One request, one inference."""

    session: onnxruntime.InferenceSession

    def do_POST(self) -> None:
        """Runs the model on the body."""
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= MAX_BYTES:
            self.answer(413, {"error": f"send 1 to {MAX_BYTES} bytes"})
            return
        (expected,) = self.session.get_inputs()
        try:
            image = np.load(io.BytesIO(self.rfile.read(length)), allow_pickle=False)
            if list(image.shape) != expected.shape or image.dtype != np.float32:
                raise ValueError(f"{image.dtype} {list(image.shape)}")
        except (ValueError, EOFError, OSError) as err:
            wanted = f"float32 {expected.shape} as .npy"
            self.answer(400, {"error": f"expected {wanted}, got {err}"})
            return
        outputs = self.session.run(None, {expected.name: image})
        names = [output.name for output in self.session.get_outputs()]
        self.answer(200, {n: o.tolist() for n, o in zip(names, outputs, strict=True)})

    def answer(self, status: int, content: dict[str, object]) -> None:
        """As JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    Handler.session = onnxruntime.InferenceSession(
        args.model, options, providers=["CPUExecutionProvider"]
    )
    server = HTTPServer(("127.0.0.1", args.port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
