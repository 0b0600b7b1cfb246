"""Makes tests/goldens/codecs/ggml.safetensors: blocks of every format with random codes, and what they mean.

The values are those of the `gguf` package (0.19), an implementation in numpy: pip install gguf safetensors, then
`python tests/goldens/ggml_blocks.py`.
"""

import pathlib

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
save_file(out, pathlib.Path(__file__).parent / "codecs" / "ggml.safetensors")
