use super::moeforge_in;

#[test]
fn a_second_quickstart_takes_a_fresh_folder_and_says_which() {
    let place = tempfile::tempdir().unwrap();
    // A base that cannot be opened: the first verb stops the pipeline, after the folder was chosen.
    let base = place.path().join("recipes/quickstart/base");
    std::fs::create_dir_all(&base).unwrap();
    std::fs::write(base.join("config.json"), "{}").unwrap();
    let chosen = || {
        let output = moeforge_in(place.path(), &["quickstart"]);
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(chosen().contains("Writing to runs/quickstart.\n"));
    for taken in ["quickstart", "quickstart-2"] {
        std::fs::create_dir_all(place.path().join("runs").join(taken)).unwrap();
    }
    let said = chosen();
    assert!(said.contains("Writing to runs/quickstart-3.\n"), "{said}");
}
