"""ONNX: a calibrated model as a graph, for onnxruntime and OpenVINO (qdq) and for Ascend's compiler (ascend).

The model is traced with a placeholder in the place of each integer layer (trace), and each placeholder becomes the
nodes of its layer (qdq_graph, ascend_graph): no layer can be mistaken for another, and no float weight of an integer
layer is in the graph.
"""
