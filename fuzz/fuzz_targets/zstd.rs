#![no_main]

moeforge_fuzz::target!("zstd");
