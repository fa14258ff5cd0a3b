"""What `export` writes: formats, how they are checked, model directories; and how an ONNX file is run."""
