"""Writing a detector as ONNX, for `torch.export` and as a model directory; each is checked by running it."""

OPSETS = range(18, 21)  # of ONNX; resizing with antialiasing came with 18
