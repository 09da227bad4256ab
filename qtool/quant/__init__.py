"""The quantizer core: pure tensors. It knows no recipe file, model, disk or method."""
