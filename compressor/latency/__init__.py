"""Measuring. Data flows down this list; each file uses only those below it.

    device            a target, ready to be asked: compare, describe, wait for a board that left
    by_runner         ... through a runner process: ONNX Runtime anywhere, TensorRT here
    trtexec           ... through the trtexec program; trtexec_text is what is said to and by it
    estimate          ... through the profile's figures alone
    probe             the staircase of a device, and its step
    process, ssh      a runner's process and its end; another machine
    machine, targets  is this the device of the profile; the profile as a target
    schema, profiles  what a profile may say; where profiles lie
    timing            the statistics: pairs, interval, when to stop, what makes a figure doubtful
    runner            what runs on the device, in one file for Python 3.6
    tensorrt_runner   the same for TensorRT's Python API; cuda and precision belong to it
    onnxruntime       a model's answers, in this process
    host              this machine

`open_device` and `compare_latency` in `device` are the doors.
"""
