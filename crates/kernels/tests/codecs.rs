//! The FP8 codecs and ggml's blocks against goldens of an independent implementation (`tests/goldens/codecs`), bit for
//! bit.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

use std::path::Path;

use moeforge_kernels::fp8::{
    Scales, ceil_power_of_two, e4m3_to_f32, e5m2_to_f32, e8m0_to_f32, encode_tiles, f32_to_e4m3,
};
use moeforge_kernels::{Format, Ggml, Matrix, Quantizer};
use safetensors::SafeTensors;

fn with_goldens(check: impl FnOnce(&SafeTensors<'_>)) {
    with_file("golden.safetensors", check);
}

fn with_file(name: &str, check: impl FnOnce(&SafeTensors<'_>)) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/codecs");
    let bytes = std::fs::read(path.join(name)).unwrap();
    check(&SafeTensors::deserialize(&bytes).unwrap());
}

fn floats(goldens: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let bytes = goldens.tensor(name).unwrap().data();
    let values = bytes.chunks(4).map(|b| b.try_into().unwrap());
    values.map(f32::from_le_bytes).collect()
}

/// Equal, where NaN equals NaN whatever its bits.
fn assert_same(found: f32, expected: f32, what: &str) {
    let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
    assert!(same, "{what}: {found}, expected {expected}");
}

#[test]
fn every_code_decodes_as_the_golden_says() {
    with_goldens(|goldens| {
        type Decode = fn(u8) -> f32;
        for (name, decode) in [
            ("e4m3fn.decode", e4m3_to_f32 as Decode),
            ("e5m2.decode", e5m2_to_f32),
            ("e8m0.decode", e8m0_to_f32),
        ] {
            for (code, expected) in (0..=255u8).zip(floats(goldens, name)) {
                assert_same(decode(code), expected, &format!("{name} {code}"));
            }
        }
    });
}

#[test]
fn values_encode_as_the_goldens_say() {
    with_goldens(|goldens| {
        let codes = goldens.tensor("e4m3fn.code").unwrap().data();
        for (value, code) in floats(goldens, "e4m3fn.in").into_iter().zip(codes) {
            assert_eq!(f32_to_e4m3(value), *code, "{value}");
        }
        let powers = floats(goldens, "ceil_pow2.in").into_iter();
        for (value, expected) in powers.zip(floats(goldens, "ceil_pow2.out")) {
            assert_same(ceil_power_of_two(value), expected, &value.to_string());
        }
    });
}

#[test]
fn blocks_encode_as_the_goldens_say() {
    with_goldens(|goldens| {
        for (name, kind) in [
            ("block128", Scales::F32),
            ("block128_ue8m0", Scales::PowerOfTwo),
        ] {
            let at = |part: &str| format!("{name}.{part}");
            let tiles = encode_tiles(&floats(goldens, &at("w")), [300, 200], [128, 128], kind);
            assert_eq!(tiles.codes, goldens.tensor(&at("q")).unwrap().data());
            assert_eq!(tiles.scales, floats(goldens, &at("scale_inv")));
            let mut decoded = vec![0.0; 300 * 200];
            tiles.decode(0..300, &mut decoded);
            assert_eq!(decoded, floats(goldens, &at("dequant")));
        }
    });
}

#[test]
fn blocks_of_ggml_keep_what_the_goldens_say() {
    with_goldens(|goldens| {
        for name in ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"] {
            let quantizer: Quantizer = format!("gguf:{}", name.to_lowercase()).parse().unwrap();
            let mut found = floats(goldens, "gguf.x");
            quantizer.round(&mut found, 512);
            let expected = floats(goldens, &format!("gguf.{name}.dequant"));
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found, expected, "{name} at {i}");
            }
        }
    });
}

/// Blocks of random codes: `tests/goldens/ggml_blocks.py`.
#[test]
fn blocks_of_every_format_decode_as_the_golden_says() {
    with_file("ggml.safetensors", |goldens| {
        for format in Ggml::WRITTEN
            .into_iter()
            .chain(Ggml::READ_ONLY)
            .filter(|format| format.block() > 1)
        {
            let name = format.name();
            let bytes = goldens.tensor(&format!("{name}.bytes")).unwrap();
            let expected = floats(goldens, &format!("{name}.values"));
            let bytes = bytes.data().to_vec().into();
            let matrix = Matrix::dense(2, expected.len() / 2, Format::Ggml(format), bytes);
            for (i, (found, expected)) in matrix.unwrap().to_f32().iter().zip(&expected).enumerate()
            {
                assert_same(*found, *expected, &format!("{name} at {i}"));
            }
        }
    });
}

/// Blocks of llama.cpp's own library: `tests/goldens/ggml_blocks.py`.
#[test]
fn values_encode_as_llama_cpp_encodes_them() {
    with_file("ggml.safetensors", |goldens| {
        let values = floats(goldens, "encode.values");
        for format in Ggml::WRITTEN
            .into_iter()
            .filter(|format| format.block() > 1)
        {
            let name = format.name();
            let golden = goldens.tensor(&format!("{name}.encoded")).unwrap();
            let expected = golden.data();
            let mut found = vec![0; expected.len()];
            format.encode(&values, &mut found);
            let size = found.len() / (values.len() / format.block());
            let blocks = found.chunks(size).zip(expected.chunks(size));
            let different = blocks.filter(|(found, expected)| found != expected).count();
            assert_eq!(different, 0, "{name}: blocks differ");
        }
    });
}

/// The same with an importance matrix, row by row.
#[test]
fn weighted_values_encode_as_llama_cpp_encodes_them() {
    with_file("ggml.safetensors", |goldens| {
        let values = floats(goldens, "encode.values");
        let importance = floats(goldens, "encode.importance");
        for format in Ggml::WRITTEN
            .into_iter()
            .filter(|format| format.block() > 1)
        {
            let name = format.name();
            let golden = goldens.tensor(&format!("{name}.weighted")).unwrap();
            let rows = values.chunks(importance.len());
            let per_row = golden.data().len() / rows.len();
            for (row, expected) in rows.zip(golden.data().chunks(per_row)) {
                let mut found = vec![0; per_row];
                format.encode_weighted(row, &importance, &mut found);
                let size = per_row / (row.len() / format.block());
                let blocks = found.chunks(size).zip(expected.chunks(size));
                let different = blocks.filter(|(found, expected)| found != expected).count();
                assert_eq!(different, 0, "{name}: blocks differ");
            }
        }
    });
}
