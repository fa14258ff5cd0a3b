"""Writing a detector as ONNX, for OpenVINO, `torch.export` and as a model directory; each is checked by running it."""

OPSETS = range(16, 21)  # of ONNX; sampling at points came with 16
DEFAULT_OPSET = 18
RESIZING_OPSET = 18  # resizing with antialiasing came with it
