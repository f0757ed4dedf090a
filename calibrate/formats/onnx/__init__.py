"""ONNX: a calibrated model as a graph, for onnxruntime and OpenVINO (qdq) and for Ascend's compiler (ascend).

The model is traced with a mark in the place of each integer layer (trace), and each mark becomes the nodes of its layer
(qdq, ascend): no layer can be mistaken for another, and no float weight of one is in the graph.
"""
