//! STUB
#![allow(missing_docs)]
use crate::error::Error;
use crate::tokenizer::Tokenizer;
pub struct ChatTemplate(String);
#[derive(Default)]
pub struct RenderInput<'a> {
    pub messages: Option<&'a serde_json::Value>,
    pub add_generation_prompt: bool,
    pub enable_thinking: Option<bool>,
    pub extra: serde_json::Map<String, serde_json::Value>,
}
impl ChatTemplate {
    pub fn new(s: &str, _b: &str, _e: &str) -> Result<Self, Error> {
        Ok(Self(s.to_owned()))
    }
    pub fn source(&self) -> &str {
        &self.0
    }
    pub fn render(&self, _i: &RenderInput<'_>) -> Result<String, Error> {
        Ok(String::new())
    }
}
pub struct ThinkTags;
impl ThinkTags {
    pub fn detect(_s: &str, _f: impl Fn(&str) -> Option<u32>) -> Option<Self> {
        None
    }
    pub fn open_at_end(&self, _t: &str) -> bool {
        false
    }
    pub fn close_text(&self) -> String {
        String::new()
    }
}
pub enum Part {
    Think,
    Text,
}
pub struct ThinkSplitter<'a>(&'a Tokenizer);
impl<'a> ThinkSplitter<'a> {
    pub fn new(_t: Option<&ThinkTags>, k: &'a Tokenizer, _s: bool) -> Self {
        Self(k)
    }
    pub fn thinking(&self) -> bool {
        false
    }
    pub fn push(&mut self, id: u32, f: &mut dyn FnMut(Part, &str)) {
        f(
            Part::Text,
            &String::from_utf8_lossy(self.0.token_bytes(id, false)),
        )
    }
    pub fn finish(&mut self, _f: &mut dyn FnMut(Part, &str)) {}
}
