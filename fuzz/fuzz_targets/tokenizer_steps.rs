#![no_main]

moeforge_fuzz::target!("tokenizer_steps");
