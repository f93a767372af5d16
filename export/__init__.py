"""Export translates: the plan and the changed weights become ONNX graphs and TensorRT engines."""
