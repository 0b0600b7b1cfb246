#![no_main]

moeforge_fuzz::target!("mlx_adapter");
