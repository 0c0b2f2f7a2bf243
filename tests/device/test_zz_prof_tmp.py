import time, threading
from tests.device.conftest import *
from tests.device.test_search_on_a_device import *
def test_x(board, named, make_config):
    board.write_client_config(LogLevel="DEBUG2")
    def look():
        time.sleep(15)
        for f in Path("/tmp").glob("cmp*/stderr"): print(f, f.read_text()[-1500:], flush=True)
        print((board.folder/"sshd.log").read_text()[-1500:], flush=True)
        print(subprocess.run("ps -ef --forest | grep -v 'ps -ef' | tail -25",shell=True,capture_output=True,text=True).stdout[-4500:], flush=True)
    threading.Thread(target=look,daemon=True).start()
    t=time.time()
    compressor.compress(make_config(device=named), on_progress=lambda p: print(p, time.time()-t, flush=True))
