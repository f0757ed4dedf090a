"""Formats `onnx` and `ascend-onnx`: a calibrated model as a graph, for onnxruntime and OpenVINO (`onnx`) or for
Ascend's compiler (`ascend-onnx`).

`trace` traces the model to a graph in which each integer layer is one placeholder node. `qdq_graph` and `ascend_graph`
then replace each placeholder by the nodes of its layer. So no layer can be mistaken for another, and the graph contains
no float weight of an integer layer.
"""
