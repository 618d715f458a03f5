//! Values that are names out of a list, for completion. What is no such name is judged where the value is used, which knows what to say.

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::error::Error;
use clap::{Arg, Command};

/// Takes any text, and offers these names.
#[derive(Clone, Copy)]
pub(crate) struct Names(pub(crate) fn() -> Vec<&'static str>);

impl TypedValueParser for Names {
    type Value = String;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new((self.0)().into_iter().map(PossibleValue::new)))
    }
}

pub(crate) fn policies() -> Vec<&'static str> {
    let all = lemma_engine::kv::policy::POLICIES.iter();
    all.map(|p| p.name).collect()
}

pub(crate) fn shapes() -> Vec<&'static str> {
    lemma_engine::synth::Shape::names().collect()
}
