#![no_main]

moeforge_fuzz::target!("dataset_card");
