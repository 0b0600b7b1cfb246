//! The tasks that a name stands for: one, those of a tag or a pattern, or those of a group, whose numbers are put together too.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/tasks/_factory.py, lm_eval/config/group.py.

use std::path::Path;
use std::sync::Arc;

use super::definition::TaskDefinition;
use super::included::read_merged;
use super::keys::{Setting, Settings};
use super::task_index::{Entry, TaskIndex};
use super::yaml::YamlValue;
use crate::{Error, Result};

/// Groups in one another.
const NESTED_GROUPS: usize = 16;

/// Tasks, and the groups that they are in.
#[derive(Clone, Debug, Default)]
pub struct TaskSet {
    /// The tasks, each once.
    pub tasks: Vec<TaskDefinition>,
    /// The groups, outer ones first.
    pub groups: Vec<TaskGroup>,
    /// Names of tasks with settings of a group.
    overridden: Vec<String>,
}

/// A group of tasks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskGroup {
    /// Its name.
    pub name: String,
    /// The name in tables.
    pub alias: Option<String>,
    /// The names of its tasks and of those in its groups.
    pub tasks: Vec<String>,
    /// Metrics that its tasks have together.
    pub metrics: Vec<GroupMetric>,
}

/// A metric of several tasks: the mean of theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMetric {
    /// The metric's name.
    pub metric: String,
    /// The filters; none is all that tasks have.
    pub filters: Option<Vec<String>>,
    /// Whether tasks weigh as much as they have items.
    pub by_size: bool,
}

type Overrides = Vec<(String, Setting)>;

impl TaskIndex {
    /// The name of the group that a file defines; none if it defines something else.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn group_name(file: &Path) -> Result<Option<String>> {
        let mut settings = read_merged(file)?;
        let is_class = settings.has("class");
        let name = settings.read("group", Setting::text)?;
        Ok(name.filter(|_| !is_class))
    }

    /// What a name stands for: a task, a tag, a group, or a pattern with `*`. None if there is nothing of that name.
    ///
    /// # Errors
    /// If a task or group is refused, or a group has itself.
    pub fn set(&self, name: &str) -> Result<Option<TaskSet>> {
        let mut set = TaskSet::default();
        if let Some(Entry::Group(path)) = self.entry(name) {
            let mut members = GroupMembers { index: self, set };
            members.add_group((name, path), read_merged(path)?, &Vec::new(), 0)?;
            return Ok((!members.set.tasks.is_empty()).then_some(members.set));
        }
        for name in self.named(name) {
            set.add(self.task(name)?, false)?;
        }
        Ok((!set.tasks.is_empty()).then_some(set))
    }
}

impl TaskSet {
    /// Adds those of another set.
    ///
    /// # Errors
    /// If two tasks of one name differ.
    pub fn extend(&mut self, other: Self) -> Result<()> {
        for task in other.tasks {
            let is_overridden = other.overridden.contains(&task.name);
            self.add(task, is_overridden)?;
        }
        let is_new = |group: &TaskGroup| !self.groups.iter().any(|known| known.name == group.name);
        let new: Vec<TaskGroup> = other.groups.into_iter().filter(is_new).collect();
        self.groups.extend(new);
        Ok(())
    }

    /// Adds a task.
    ///
    /// # Errors
    /// If there is another one of that name.
    pub fn add(&mut self, task: TaskDefinition, is_overridden: bool) -> Result<()> {
        if let Some(known) = self.tasks.iter().find(|known| known.name == task.name) {
            let differs = is_overridden || self.overridden.contains(&task.name);
            if differs || known.file != task.file {
                let expected = "tasks of different names";
                let found = format!("`{}` twice, also in `{}`", task.name, known.file.display());
                return Err(Error::malformed(
                    &task.file,
                    format!("expected {expected}, found {found}"),
                ));
            }
            return Ok(());
        }
        if is_overridden {
            self.overridden.push(task.name.clone());
        }
        self.tasks.push(task);
        Ok(())
    }
}

/// Reads groups and what is in them.
struct GroupMembers<'a> {
    index: &'a TaskIndex,
    set: TaskSet,
}

impl GroupMembers<'_> {
    /// Adds a group and its tasks. Returns the names of the tasks.
    fn add_group(
        &mut self,
        (name, file): (&str, &Path),
        mut keys: Settings,
        outer: &Overrides,
        depth: usize,
    ) -> Result<Vec<String>> {
        if depth > NESTED_GROUPS {
            let problem =
                format!("expected groups that do not have themselves, found `{name}` in itself");
            return Err(Error::malformed(file, problem));
        }
        _ = keys.take("group");
        let alias = keys.read("group_alias", Setting::text)?;
        let metrics = keys.read("aggregate_metric_list", |of| {
            of.items()?
                .iter()
                .map(group_metric)
                .collect::<Result<Vec<_>>>()
        })?;
        for key in ["metadata", "tag"] {
            _ = keys.take(key);
        }
        let members = keys.take("task");
        let overrides = over(outer, keys.rest());
        let at = self.set.groups.len();
        self.set.groups.push(TaskGroup {
            name: name.to_owned(),
            alias,
            tasks: Vec::new(),
            metrics: metrics.unwrap_or_default(),
        });
        let mut names: Vec<String> = Vec::new();
        for member in members
            .map(|of| of.items())
            .transpose()?
            .unwrap_or_default()
        {
            for task in self.add_member((name, file), &member, &overrides, depth)? {
                if !names.contains(&task) {
                    names.push(task);
                }
            }
        }
        self.set.groups[at].tasks.clone_from(&names);
        Ok(names)
    }

    /// Adds a member of a group: a task, tag or group by its name, one with settings of its own, or one that is defined in place.
    fn add_member(
        &mut self,
        (group, file): (&str, &Path),
        member: &Setting,
        outer: &Overrides,
        depth: usize,
    ) -> Result<Vec<String>> {
        let (name, own, is_group) = match &member.yaml.value {
            YamlValue::Text(name) => (name.clone(), Vec::new(), false),
            _ => {
                let mut keys = member.map()?;
                let is_group = keys.has("group");
                let key = if is_group { "group" } else { "task" };
                let name = keys.read(key, Setting::text)?;
                let name = name
                    .ok_or_else(|| member.error("a mapping with `task` or `group`", "neither"))?;
                (name, keys.rest(), is_group)
            }
        };
        let overrides = over(outer, own.clone());
        let is_overridden = !overrides.is_empty();
        match self.index.entry(&name) {
            Some(Entry::Group(path)) => {
                self.add_group((&name, path), read_merged(path)?, &overrides, depth + 1)
            }
            Some(Entry::Task(path)) => {
                let settings = Settings::new(over(&read_merged(path)?.rest(), overrides));
                let path: Arc<Path> = path.as_path().into();
                self.set.add(
                    TaskDefinition::read(settings, &path, name.clone())?,
                    is_overridden,
                )?;
                Ok(vec![name])
            }
            Some(Entry::Class(_)) => self.index.task(&name).map(|task| vec![task.name]),
            None if is_group => {
                let name = format!("{group}::{name}");
                self.add_group((&name, file), Settings::new(own), outer, depth + 1)
            }
            None => {
                let tagged: Vec<String> = self
                    .index
                    .named(&name)
                    .into_iter()
                    .map(str::to_owned)
                    .collect();
                for task in &tagged {
                    let member = Setting::new("task", member.yaml.with_text(task), &member.file);
                    self.add_member((group, file), &member, &overrides, depth + 1)?;
                }
                if !tagged.is_empty() {
                    return Ok(tagged);
                }
                if own.is_empty() {
                    return Err(
                        member.error("the name of a task, tag or group", format!("`{name}`"))
                    );
                }
                let name = format!("{group}::{name}");
                let file: Arc<Path> = file.into();
                let task = TaskDefinition::read(Settings::new(overrides), &file, name.clone())?;
                self.set.add(task, true)?;
                Ok(vec![name])
            }
        }
    }
}

/// Settings, some of them replaced.
fn over(settings: &Overrides, others: Overrides) -> Overrides {
    let mut all = settings.clone();
    for (key, setting) in others {
        match all.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = setting,
            None => all.push((key, setting)),
        }
    }
    all
}

fn group_metric(of: &Setting) -> Result<GroupMetric> {
    let mut keys = of.map()?;
    let metric = keys.read("metric", Setting::text)?;
    let metric = metric.ok_or_else(|| of.error("a mapping with `metric`", "none"))?;
    let filters = keys.read("filter_list", Setting::texts)?;
    let by_size = keys
        .read("weight_by_size", Setting::boolean)?
        .unwrap_or(true);
    _ = keys.read("aggregation", |of| of.one_of(&[("mean", ())]))?;
    keys.finish()?;
    Ok(GroupMetric {
        metric,
        filters,
        by_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: &str = "dataset_path: json\ndataset_kwargs: {data_files: {test: a.jsonl}}\ntest_split: test\ndoc_to_text: q\ndoc_to_target: a\noutput_type: loglikelihood\n";

    fn set(files: &[(&str, &str)], name: &str) -> Result<TaskSet, String> {
        let place = tempfile::tempdir().unwrap();
        for (file, text) in files {
            std::fs::write(place.path().join(file), text).unwrap();
        }
        let clean = |problem: Error| {
            let place = place.path().display().to_string();
            problem.to_string().replace(&place, "DIR")
        };
        let index = TaskIndex::open(place.path()).map_err(clean)?;
        let found = index.set(name).map_err(clean)?;
        found.ok_or_else(|| "nothing".into())
    }

    fn task(name: &str, tag: &str) -> String {
        format!("task: {name}\ntag: {tag}\n{TASK}")
    }

    #[test]
    fn groups_have_their_tasks_with_settings_of_their_own() {
        let [a, b, c] = ["a", "b", "c"].map(|name| task(name, if name == "c" { "x" } else { "t" }));
        let outer = "group: outer\ngroup_alias: Outer\ntask:\n- inner\n- task: c\n  num_fewshot: 3\n- group: here\n  task: [b]\n- task: new\n  dataset_path: json\n  dataset_kwargs: {data_files: {test: a.jsonl}}\n  test_split: test\n  doc_to_text: q\n  doc_to_target: a\naggregate_metric_list:\n- metric: acc\n  weight_by_size: false\n";
        let inner =
            "group: inner\ntask: t\naggregate_metric_list: {metric: acc, filter_list: none}\n";
        let files = [
            ("a.yaml", &*a),
            ("b.yaml", &b),
            ("c.yaml", &c),
            ("o.yaml", outer),
            ("i.yaml", inner),
        ];
        let found = set(&files, "outer").unwrap();
        let tasks: Vec<(&str, Option<usize>)> = found
            .tasks
            .iter()
            .map(|task| (task.name.as_str(), task.fewshot.count))
            .collect();
        assert_eq!(
            tasks,
            [
                ("a", None),
                ("b", None),
                ("c", Some(3)),
                ("outer::new", None)
            ]
        );
        let groups: Vec<(&str, String)> = found
            .groups
            .iter()
            .map(|group| (group.name.as_str(), group.tasks.join(" ")))
            .collect();
        assert_eq!(
            groups,
            [
                ("outer", "a b c outer::new".into()),
                ("inner", "a b".into()),
                ("outer::here", "b".into())
            ]
        );
        assert_eq!(found.groups[0].alias.as_deref(), Some("Outer"));
        let metric = |filters, by_size| GroupMetric {
            metric: "acc".into(),
            filters,
            by_size,
        };
        assert_eq!(found.groups[0].metrics, [metric(None, false)]);
        assert_eq!(
            found.groups[1].metrics,
            [metric(Some(vec!["none".into()]), true)]
        );
        for (name, expected) in [("t", "a b"), ("a", "a"), ("*", "a b c"), ("inner", "a b")] {
            let tasks = set(&files, name).unwrap().tasks;
            let names: Vec<String> = tasks.into_iter().map(|task| task.name).collect();
            assert_eq!(names.join(" "), expected, "{name}");
        }
        assert_eq!(set(&files, "d").unwrap_err(), "nothing");
    }

    #[test]
    fn groups_that_make_no_sense_are_refused() {
        let a = task("a", "t");
        let with = |group: &str| set(&[("a.yaml", &a), ("g.yaml", group)], "g").unwrap_err();
        assert_eq!(
            with("group: g\ntask: [a, g]\n"),
            "DIR/g.yaml: expected groups that do not have themselves, found `g` in itself"
        );
        assert_eq!(
            with("group: g\ntask: [b]\n"),
            "DIR/g.yaml:2: expected the name of a task, tag or group as `task[0]`, found `b`"
        );
        assert_eq!(
            with("group: g\ntask:\n- a\n- {task: a, num_fewshot: 1}\n"),
            "DIR/a.yaml: expected tasks of different names, found `a` twice, also in `DIR/a.yaml`"
        );
        let problem =
            with("group: g\ntask: [a]\naggregate_metric_list: [{metric: acc, weigh: 1}]\n");
        assert!(
            problem.starts_with("DIR/g.yaml:3: expected a known key"),
            "{problem}"
        );
        assert!(
            problem.ends_with("found `aggregate_metric_list[0].weigh`"),
            "{problem}"
        );
    }
}
