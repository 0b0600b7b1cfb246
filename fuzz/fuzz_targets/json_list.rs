#![no_main]

moeforge_fuzz::target!("json_list");
