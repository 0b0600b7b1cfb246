"""Makes tests/goldens/codecs/ggml.safetensors: blocks of every format with random codes and what they mean, and values
with the blocks that llama.cpp makes of them.

The values are those of the `gguf` package (0.19), an implementation in numpy, the blocks those of llama.cpp's own library
(0.25 of ggml): pip install gguf safetensors, then `python tests/goldens/ggml_blocks.py PATH/TO/libggml-base.so`.
"""

import ctypes
import pathlib
import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from safetensors.numpy import save_file

# Bytes of a block, and where its half-precision numbers are.
FORMATS = {
    "q8_0": (Type.Q8_0, 34, [0]),
    "q4_0": (Type.Q4_0, 18, [0]),
    "q4_1": (Type.Q4_1, 20, [0, 2]),
    "q5_0": (Type.Q5_0, 22, [0]),
    "q5_1": (Type.Q5_1, 24, [0, 2]),
    "q2_k": (Type.Q2_K, 84, [80, 82]),
    "q3_k": (Type.Q3_K, 110, [108]),
    "q4_k": (Type.Q4_K, 144, [0, 2]),
    "q5_k": (Type.Q5_K, 176, [0, 2]),
    "q6_k": (Type.Q6_K, 210, [208]),
    "iq4_nl": (Type.IQ4_NL, 18, [0]),
    "mxfp4": (Type.MXFP4, 17, []),
}

random = np.random.default_rng(7)
out = {}
for name, (kind, size, halves) in FORMATS.items():
    blocks = random.integers(0, 256, (2, size), dtype=np.uint8)
    for at in halves:
        scales = random.uniform(-0.1, 0.1, 2).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(2, 2)
    values = dequantize(blocks.reshape(1, -1), kind).reshape(-1)
    out[f"{name}.bytes"] = blocks.reshape(-1)
    out[f"{name}.values"] = values.astype(np.float32)

ROWS, COLS = 4, 512
values = random.normal(0, 0.02, (ROWS, COLS)).astype(np.float32)
# Rows of other sizes, a group of zeros, one of a constant, and outliers.
values[1] *= 100
values[2, ::37] *= 20
values[2, 32:64] = 0
values[2, 64:96] = -0.01
values[3] = np.abs(values[3])
out["encode.values"] = values
ggml = ctypes.CDLL(sys.argv[1])
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
for name, (kind, size, _) in FORMATS.items():
    if name == "mxfp4":
        continue
    block = 256 if name.endswith("_k") else 32
    coded = np.zeros(ROWS * COLS // block * size, dtype=np.uint8)
    ggml.ggml_quantize_chunk(
        int(kind), values.ctypes.data_as(ctypes.c_void_p), coded.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), ctypes.c_int64(ROWS), ctypes.c_int64(COLS), None,
    )
    out[f"{name}.encoded"] = coded

# The same values where columns differ in importance by a factor of 10,000 and more, and one has nearly none.
importance = np.exp(random.normal(0, 2, COLS)).astype(np.float32)
importance[::41] *= 100
importance[7] = 1e-6
out["encode.importance"] = importance
for name, (kind, size, _) in FORMATS.items():
    if name == "mxfp4":
        continue
    block = 256 if name.endswith("_k") else 32
    coded = np.zeros(ROWS * COLS // block * size, dtype=np.uint8)
    ggml.ggml_quantize_chunk(
        int(kind), values.ctypes.data_as(ctypes.c_void_p), coded.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), ctypes.c_int64(ROWS), ctypes.c_int64(COLS), importance.ctypes.data_as(ctypes.c_void_p),
    )
    out[f"{name}.weighted"] = coded
save_file(out, pathlib.Path(__file__).parent / "codecs" / "ggml.safetensors")
