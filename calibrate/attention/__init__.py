"""Measures the error that attention would have if query, key and value became codes, as the kernels of MindIE-SD and
ComfyUI make them: for each attention module and each head, with and without a rotation of query and key.

Reading order:

1. `inputs`: the arguments of one call of attention; the output in float32
2. `rotations`: orthogonal matrices; `codes`: how numbers become codes; `kinds`: the types of quantized attention
3. `calling`: finds the module that calls attention while the model runs
4. `measure`: the error of each head; `choice`: the type of each module under a bound, and the report
"""
