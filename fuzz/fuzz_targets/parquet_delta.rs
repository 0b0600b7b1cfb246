#![no_main]

moeforge_fuzz::target!("parquet_delta");
