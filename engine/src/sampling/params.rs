//! Parameters of the sampler and where each value came from.

use super::SamplingError;

/// Where the value of a parameter came from, strongest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParamSource {
    /// Set in the course of a conversation.
    Set,
    /// Given on the command line or in a request.
    Flag,
    /// An environment variable.
    Env,
    /// The model's `general.sampling.*` keys.
    Model,
    /// Built in.
    Builtin,
}

impl ParamSource {
    /// The name under which it is shown: `set`, `flag`, `env`, `model` or `builtin`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Set => "set",
            Self::Flag => "flag",
            Self::Env => "env",
            Self::Model => "model",
            Self::Builtin => "builtin",
        }
    }
}

impl std::fmt::Display for ParamSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a type of parameter is read from and shown as text.
trait Value: Sized {
    fn parse(text: &str) -> Option<Self>;
    fn show(&self) -> String;
}

macro_rules! plain_value {
    ($($t:ty),*) => {$(
        impl Value for $t {
            fn parse(text: &str) -> Option<Self> { text.trim().parse().ok() }
            fn show(&self) -> String { self.to_string() }
        }
    )*};
}
plain_value!(f32, i32, u32, usize);

impl Value for Option<u64> {
    /// -1 and `random` ask for a new seed.
    fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "-1" | "random" => Some(None),
            t => t.parse().ok().map(Some),
        }
    }
    fn show(&self) -> String {
        self.map_or_else(|| "random".into(), |s| s.to_string())
    }
}

impl Value for Vec<String> {
    /// One string, or `none` for an empty list.
    fn parse(text: &str) -> Option<Self> {
        Some(if text == "none" {
            Vec::new()
        } else {
            vec![text.to_owned()]
        })
    }
    fn show(&self) -> String {
        format!("{self:?}")
    }
}

impl Value for Vec<(u32, f32)> {
    /// `TOKEN+BIAS` or `TOKEN-BIAS`, several separated by commas; the bias may be `inf`.
    fn parse(text: &str) -> Option<Self> {
        let one = |item: &str| {
            let at = item.find(['+', '-'])?;
            let bias: f32 = item[at..].parse().ok()?;
            Some((item[..at].trim().parse().ok()?, bias)).filter(|(_, b): &(u32, f32)| !b.is_nan())
        };
        text.split(',').map(|s| one(s.trim())).collect()
    }
    fn show(&self) -> String {
        self.iter()
            .map(|(t, b)| format!("{t}{b:+}"))
            .collect::<Vec<_>>()
            .join(",")
    }
}

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident: $t:ty = $default:expr, $expected:literal, $valid:expr;)*) => {
        /// Parameters of a [`Sampler`](super::Sampler); [`Default`] gives the built-in values.
        #[derive(Debug, Clone, PartialEq)]
        pub struct SamplerParams { $($(#[$doc])* pub $name: $t,)* }

        /// Values of one source; `None` leaves a parameter to the next weaker source.
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct SamplerOverrides { $($(#[$doc])* pub $name: Option<$t>,)* }

        /// For each parameter, the source that won.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct ParamSources { $($(#[$doc])* pub $name: ParamSource,)* }

        impl Default for SamplerParams {
            fn default() -> Self { Self { $($name: $default,)* } }
        }

        impl Default for ParamSources {
            fn default() -> Self { Self { $($name: ParamSource::Builtin,)* } }
        }

        impl SamplerParams {
            /// Names of all parameters.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            /// Merges layers over the built-in values. Of the layers that set a parameter the one with the strongest
            /// source wins, whatever their order; among equals the last.
            pub fn merge<'a>(
                layers: impl IntoIterator<Item = (ParamSource, &'a SamplerOverrides)>,
            ) -> (Self, ParamSources) {
                let (mut params, mut sources) = (Self::default(), ParamSources::default());
                for (source, layer) in layers {
                    $(if let Some(v) = &layer.$name && source <= sources.$name {
                        params.$name = v.clone();
                        sources.$name = source;
                    })*
                }
                (params, sources)
            }

            /// Checks every value.
            ///
            /// # Errors
            /// [`SamplingError::BadValue`] for the first that makes no sense.
            pub fn validate(&self) -> Result<(), SamplingError> {
                $({
                    let valid: fn(&$t) -> bool = $valid;
                    if !valid(&self.$name) {
                        return Err(SamplingError::BadValue {
                            name: stringify!($name), found: self.$name.show(), expected: $expected,
                        });
                    }
                })*
                Ok(())
            }

            /// Name, value as text and source of every parameter, for showing.
            pub fn describe(&self, sources: &ParamSources) -> Vec<(&'static str, String, ParamSource)> {
                vec![$((stringify!($name), self.$name.show(), sources.$name)),*]
            }
        }

        impl SamplerOverrides {
            /// Sets one parameter from text, as in `/set temp 0.7`.
            ///
            /// # Errors
            /// [`SamplingError::UnknownName`], or [`SamplingError::BadValue`] if the text is not a value it may have.
            pub fn set(&mut self, name: &str, text: &str) -> Result<(), SamplingError> {
                match name {
                    $(stringify!($name) => {
                        let valid: fn(&$t) -> bool = $valid;
                        self.$name = Some(<$t as Value>::parse(text).filter(|v| valid(v)).ok_or_else(|| {
                            SamplingError::BadValue {
                                name: stringify!($name), found: format!("{text:?}"), expected: $expected,
                            }
                        })?);
                    })*
                    _ => return Err(SamplingError::UnknownName(name.to_owned())),
                }
                Ok(())
            }
        }
    };
}

params! {
    /// Temperature; 0 or less always takes the most probable token.
    temp: f32 = 0.8, "a number", |x| x.is_finite();
    /// Half width of the range of the dynamic temperature; 0 is off.
    dynatemp_range: f32 = 0.0, "a number of at least 0", |x| *x >= 0.0 && x.is_finite();
    /// How entropy maps to the dynamic temperature.
    dynatemp_exponent: f32 = 1.0, "a number", |x| x.is_finite();
    /// Keep the k most probable tokens; 0 or -1 is off.
    top_k: i32 = 40, "an integer of at least -1", |x| *x >= -1;
    /// Keep the most probable tokens until their mass reaches p; 1 is off.
    top_p: f32 = 0.95, "a number from 0 to 1", |x| (0.0..=1.0).contains(x);
    /// Drop tokens less probable than p times the best; 0 is off.
    min_p: f32 = 0.05, "a number of at least 0", |x| *x >= 0.0;
    /// Keep the tokens of typical surprise until their mass exceeds p; 1 is off.
    typical: f32 = 1.0, "a number of at least 0", |x| *x >= 0.0;
    /// Keep tokens within n standard deviations of the best logit; 0 or less is off.
    top_n_sigma: f32 = -1.0, "a number", |x| !x.is_nan();
    /// Divides positive and multiplies negative logits of recent tokens; 1 is off.
    repeat_penalty: f32 = 1.0, "a number above 0", |x| *x > 0.0 && x.is_finite();
    /// Tokens that the penalties look back; 0 is off, negative is everything.
    repeat_last_n: i32 = 64, "an integer", |_| true;
    /// Subtracted once from the logit of every recent token.
    presence_penalty: f32 = 0.0, "a number", |x| x.is_finite();
    /// Subtracted from the logit of a recent token for each of its occurrences.
    frequency_penalty: f32 = 0.0, "a number", |x| x.is_finite();
    /// Strength of the DRY penalty; 0 is off.
    dry_multiplier: f32 = 0.0, "a number", |x| x.is_finite();
    /// Base of the DRY penalty; below 1 is off.
    dry_base: f32 = 1.75, "a number", |x| x.is_finite();
    /// Repetitions up to this many tokens are not penalised.
    dry_allowed_length: u32 = 2, "an integer of at least 0", |_| true;
    /// Tokens that DRY looks back; 0 is off, negative is everything.
    dry_penalty_last_n: i32 = 64, "an integer", |_| true;
    /// Strings that a repetition does not reach across.
    dry_sequence_breakers: Vec<String> = ["\n", ":", "\"", "*"].map(String::from).to_vec(), "strings", |_| true;
    /// Probability with which XTC strikes; 0 is off.
    xtc_probability: f32 = 0.0, "a number from 0 to 1", |x| (0.0..=1.0).contains(x);
    /// Probability from which a token is a top choice to XTC; above 0.5 is off.
    xtc_threshold: f32 = 0.1, "a number of at least 0", |x| *x >= 0.0;
    /// 0 off, 1 Mirostat, 2 Mirostat 2.0; replaces every truncation and penalty.
    mirostat: u32 = 0, "0, 1 or 2", |x| *x <= 2;
    /// Target surprise of Mirostat, in bits.
    mirostat_tau: f32 = 5.0, "a number", |x| x.is_finite();
    /// Learning rate of Mirostat.
    mirostat_eta: f32 = 0.1, "a number", |x| x.is_finite();
    /// Seed of the random stream; `None` picks a new one.
    seed: Option<u64> = None, "an integer, or -1 for a random one", |_| true;
    /// Truncation leaves at least this many tokens, if there are as many.
    min_keep: usize = 0, "an integer of at least 0", |_| true;
    /// Added to the logits of single tokens (id, bias); minus infinity forbids one.
    logit_bias: Vec<(u32, f32)> = Vec::new(), "TOKEN+BIAS or TOKEN-BIAS", |v| v.iter().all(|(_, b)| !b.is_nan());
}

impl SamplerOverrides {
    /// The recommendations of a model file: its `general.sampling.*` keys, through a lookup of numbers by full key.
    /// Values that make no sense are left out.
    pub fn from_model(number: impl Fn(&str) -> Option<f64>) -> Self {
        const KEYS: &[(&str, &str)] = &[
            ("temp", "temp"),
            ("top_k", "top_k"),
            ("top_p", "top_p"),
            ("min_p", "min_p"),
            ("xtc_probability", "xtc_probability"),
            ("xtc_threshold", "xtc_threshold"),
            ("penalty_last_n", "repeat_last_n"),
            ("penalty_repeat", "repeat_penalty"),
            ("mirostat", "mirostat"),
            ("mirostat_tau", "mirostat_tau"),
            ("mirostat_eta", "mirostat_eta"),
        ];
        let mut overrides = Self::default();
        for (key, name) in KEYS {
            if let Some(x) = number(&format!("general.sampling.{key}")) {
                // f32 on the way, so that 0.95 stored as f32 is not shown as 0.949999988.
                let text = (x as f32).to_string();
                if let Err(e) = overrides.set(name, &text) {
                    log::warn!("ignoring general.sampling.{key} of the model: {e}");
                }
            }
        }
        overrides
    }
}
