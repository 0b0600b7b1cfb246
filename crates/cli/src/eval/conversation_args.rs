//! Options of prompts as conversations.

use data::{ChatTemplate, GenerationPrompt, TaskChat};

// Whether prompts are conversations.
#[derive(Debug, Default, Clone, clap::Args)]
#[command(next_help_heading = "Conversations")]
pub(crate) struct ConversationArgs {
    /// Ask tasks of lm-evaluation-harness in the model's chat template. Thoughts before answers are left out.
    #[arg(long)]
    pub(crate) chat_template: bool,
    /// With --chat-template: whether each example is a question and an answer of the conversation, or all are in one message.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, requires = "chat_template")]
    pub(crate) fewshot_as_multiturn: bool,
    /// System message. Default: none.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Turn on reasoning, if the chat template has a switch for it.
    #[arg(long, requires = "chat_template")]
    pub(crate) think: bool,
    /// Turn off reasoning, if the chat template has a switch for it.
    #[arg(long, requires = "chat_template", conflicts_with = "think")]
    pub(crate) no_think: bool,
}

impl ConversationArgs {
    /// How prompts become conversations.
    pub(super) fn task_chat<'a>(&'a self, template: Option<&'a ChatTemplate>) -> TaskChat<'a> {
        TaskChat {
            template,
            system: self.system.as_deref(),
            is_single_turn: !self.fewshot_as_multiturn,
            generation_prompt: match (self.think, self.no_think) {
                (true, _) => Some(GenerationPrompt::Think),
                (_, true) => Some(GenerationPrompt::NoThink),
                _ => None,
            },
            ..TaskChat::default()
        }
    }
}
