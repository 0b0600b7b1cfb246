#![no_main]

moeforge_fuzz::target!("task");
