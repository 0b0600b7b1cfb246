//! The sizes of ggml's blocks stand in two crates that cannot name each other: with the dtypes of files, and with the
//! decoders of kernels.

use checkpoint::DType;
use kernels::Ggml;

#[test]
fn files_and_kernels_agree_on_the_sizes_of_blocks() {
    let dtypes = [
        (DType::F16, Ggml::F16),
        (DType::Q4_0, Ggml::Q4_0),
        (DType::Q4_1, Ggml::Q4_1),
        (DType::Q5_0, Ggml::Q5_0),
        (DType::Q5_1, Ggml::Q5_1),
        (DType::Q8_0, Ggml::Q8_0),
        (DType::Q2K, Ggml::Q2K),
        (DType::Q3K, Ggml::Q3K),
        (DType::Q4K, Ggml::Q4K),
        (DType::Q5K, Ggml::Q5K),
        (DType::Q6K, Ggml::Q6K),
        (DType::Iq4Nl, Ggml::Iq4Nl),
        (DType::MxFp4, Ggml::MxFp4),
    ];
    assert_eq!(
        dtypes.len(),
        Ggml::WRITTEN.len() + Ggml::READ_ONLY.len(),
        "a dtype for every format"
    );
    for (dtype, format) in dtypes {
        assert_eq!(dtype.block(), format.block(), "{dtype}");
        assert_eq!(dtype.size_bytes(), format.block_bytes(), "{dtype}");
    }
}
