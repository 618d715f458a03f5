//! Small models with random weights of any type, for shapes and types that no file of the test data has.

use lemma_engine::gguf::write::Builder;
use lemma_engine::gguf::{GgmlType, GgufFile};

use crate::{copy_key, data};

const N_EMBD: usize = 256;
const N_FF: usize = 96;

/// A model to be written.
struct Draft {
    arch: &'static str,
    numbers: Vec<(&'static str, usize)>,
    /// Name and shape, row length first.
    tensors: Vec<(String, Vec<usize>)>,
}

impl Draft {
    fn new(arch: &'static str, n_layer: usize, numbers: &[(&'static str, usize)]) -> Self {
        let mut all = vec![
            ("context_length", 2048),
            ("embedding_length", N_EMBD),
            ("feed_forward_length", N_FF),
            ("block_count", n_layer),
        ];
        all.extend(numbers);
        Self {
            arch,
            numbers: all,
            tensors: vec![
                ("token_embd.weight".to_owned(), vec![N_EMBD, 284]),
                ("output_norm.weight".to_owned(), vec![N_EMBD]),
            ],
        }
    }

    fn add(&mut self, il: usize, tensors: &[(&str, &[usize])]) {
        let named = |(name, shape): &(&str, &[usize])| (format!("blk.{il}.{name}"), shape.to_vec());
        self.tensors.extend(tensors.iter().map(named));
    }

    fn add_ffn(&mut self, il: usize, n_expert: usize, gates_shared: bool) {
        if n_expert == 0 {
            return self.add(
                il,
                &[
                    ("ffn_gate.weight", &[N_EMBD, N_FF]),
                    ("ffn_up.weight", &[N_EMBD, N_FF]),
                    ("ffn_down.weight", &[N_FF, N_EMBD]),
                ],
            );
        }
        self.add_experts(il, n_expert, 32);
        self.add_shared_expert(il);
        if gates_shared {
            self.add(il, &[("ffn_gate_inp_shexp.weight", &[N_EMBD])]);
        }
    }

    /// A router and experts of `n_ff` elements.
    fn add_experts(&mut self, il: usize, n_expert: usize, n_ff: usize) {
        let experts: [(&str, &[usize]); 4] = [
            ("ffn_gate_inp.weight", &[N_EMBD, n_expert]),
            ("ffn_gate_exps.weight", &[N_EMBD, n_ff, n_expert]),
            ("ffn_up_exps.weight", &[N_EMBD, n_ff, n_expert]),
            ("ffn_down_exps.weight", &[n_ff, N_EMBD, n_expert]),
        ];
        self.add(il, &experts);
    }

    /// One of 32 elements that every token is sent to.
    fn add_shared_expert(&mut self, il: usize) {
        let expert: [(&str, &[usize]); 3] = [
            ("ffn_gate_shexp.weight", &[N_EMBD, 32]),
            ("ffn_up_shexp.weight", &[N_EMBD, 32]),
            ("ffn_down_shexp.weight", &[32, N_EMBD]),
        ];
        self.add(il, &expert);
    }

    /// Attention of `n_head` heads over `n_kv`, `head` wide, and its norm.
    fn add_attention(&mut self, il: usize, [n_head, n_kv, head]: [usize; 3]) {
        let attention: [(&str, &[usize]); 5] = [
            ("attn_norm.weight", &[N_EMBD]),
            ("attn_q.weight", &[N_EMBD, n_head * head]),
            ("attn_k.weight", &[N_EMBD, n_kv * head]),
            ("attn_v.weight", &[N_EMBD, n_kv * head]),
            ("attn_output.weight", &[n_head * head, N_EMBD]),
        ];
        self.add(il, &attention);
    }

    /// A state space, without the norm ahead of it.
    fn add_mamba2(&mut self, il: usize, [n_head, dim, n_group, d_state]: [usize; 4]) {
        let inner = n_head * dim;
        let xbc = inner + 2 * n_group * d_state;
        let tensors: [(&str, &[usize]); 8] = [
            ("ssm_in.weight", &[N_EMBD, inner + xbc + n_head]),
            ("ssm_conv1d.weight", &[4, xbc]),
            ("ssm_conv1d.bias", &[xbc]),
            ("ssm_dt.bias", &[n_head]),
            ("ssm_a", &[1, n_head]),
            ("ssm_d", &[1, n_head]),
            ("ssm_norm.weight", &[inner / n_group, n_group]),
            ("ssm_out.weight", &[inner, N_EMBD]),
        ];
        self.add(il, &tensors);
    }

    /// The file: matrices in the first of `types` whose blocks rows are made of, else in f32.
    fn write(&self, types: &[GgmlType], more: impl Fn(&mut Builder)) -> GgufFile {
        let vocab = GgufFile::open(&data().join("arch/qwen35.gguf")).unwrap();
        let mut b = Builder::new();
        for (key, value) in vocab.meta().iter() {
            if key.starts_with("tokenizer.") {
                copy_key(&mut b, key, value);
            }
        }
        b.str("general.architecture", self.arch);
        for (name, n) in &self.numbers {
            b.u32(&format!("{}.{name}", self.arch), *n as u32);
        }
        let key = |name: &str| format!("{}.{name}", self.arch);
        b.f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
            .f32(&key("rope.freq_base"), 1000.0);
        more(&mut b);
        let mut body = Vec::new();
        let mut seed = 1u64;
        for (name, shape) in &self.tensors {
            let (n_in, n) = (shape[0], shape.iter().product::<usize>());
            let tables = ["conv1d", "conv.conv", "ssm_norm", "ssm_a", "ssm_d"];
            let is_table = tables.iter().any(|part| name.contains(part));
            let matrix = shape.len() > 1 && !is_table;
            let mut fitting = types.iter().filter(|t| n_in.is_multiple_of(t.block_size()));
            let ty = *fitting.next().filter(|_| matrix).unwrap_or(&GgmlType::F32);
            let dims: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
            b.tensor(name, ty, &dims);
            let scale = match matrix {
                true => (n_in as f32).sqrt().recip(),
                false => 0.5,
            };
            let mut random = || {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let x = 1.7 * scale * ((seed >> 40) as f32 / 2f32.powi(23) - 1.0);
                match name.as_str() {
                    n if n.ends_with("norm.weight") => 1.0 + x / 2.0,
                    n if n.ends_with("ssm_a") => -x.abs() - 0.05,
                    _ => x,
                }
            };
            let x: Vec<f32> = (0..n).map(|_| random()).collect();
            let quantize = ty.traits().quantize_row.unwrap();
            let mut row = vec![0; ty.row_size(n_in).unwrap()];
            for x in x.chunks_exact(n_in) {
                quantize(x, &mut row);
                body.extend_from_slice(&row);
            }
        }
        let mut file = b.begin(Vec::new()).unwrap();
        file.write(&body).unwrap();
        GgufFile::from_bytes(file.finish().unwrap(), "made.gguf").unwrap()
    }
}

/// `qwen35` or `qwen35moe`: delta nets of `n_k` and `n_v` heads, `dim` wide, in every layer but each third.
pub fn delta_net(
    arch: &'static str,
    [n_k, n_v, dim]: [usize; 3],
    n_layer: usize,
    types: &[GgmlType],
) -> GgufFile {
    // As wide as in Qwen3.5 where the delta nets are.
    let head = if dim == 128 { 256 } else { 32 };
    let (n_qkv, values) = ((2 * n_k + n_v) * dim, n_v * dim);
    let n_expert = if arch == "qwen35moe" { 4 } else { 0 };
    let mut numbers = vec![
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", head),
        ("attention.value_length", head),
        ("rope.dimension_count", 16),
        ("ssm.conv_kernel", 4),
        ("ssm.state_size", dim),
        ("ssm.group_count", n_k),
        ("ssm.time_step_rank", n_v),
        ("ssm.inner_size", values),
        ("full_attention_interval", 3),
    ];
    if n_expert > 0 {
        numbers.extend([
            ("expert_count", n_expert),
            ("expert_used_count", 2),
            ("expert_feed_forward_length", 32),
            ("expert_shared_feed_forward_length", 32),
        ]);
    }
    let mut d = Draft::new(arch, n_layer, &numbers);
    for il in 0..n_layer {
        let norms: [(&str, &[usize]); 2] = [
            ("attn_norm.weight", &[N_EMBD]),
            ("post_attention_norm.weight", &[N_EMBD]),
        ];
        d.add(il, &norms);
        if (il + 1) % 3 == 0 {
            let attention: [(&str, &[usize]); 6] = [
                ("attn_q.weight", &[N_EMBD, 4 * head]),
                ("attn_k.weight", &[N_EMBD, head]),
                ("attn_v.weight", &[N_EMBD, head]),
                ("attn_q_norm.weight", &[head]),
                ("attn_k_norm.weight", &[head]),
                ("attn_output.weight", &[2 * head, N_EMBD]),
            ];
            d.add(il, &attention);
        } else {
            let delta: [(&str, &[usize]); 9] = [
                ("attn_qkv.weight", &[N_EMBD, n_qkv]),
                ("attn_gate.weight", &[N_EMBD, values]),
                ("ssm_conv1d.weight", &[4, n_qkv]),
                ("ssm_dt.bias", &[n_v]),
                ("ssm_a", &[n_v]),
                ("ssm_beta.weight", &[N_EMBD, n_v]),
                ("ssm_alpha.weight", &[N_EMBD, n_v]),
                ("ssm_norm.weight", &[dim]),
                ("ssm_out.weight", &[values, N_EMBD]),
            ];
            d.add(il, &delta);
        }
        d.add_ffn(il, n_expert, true);
    }
    d.write(types, |b| {
        let key = format!("{arch}.rope.dimension_sections");
        b.i32s(&key, [3, 3, 2, 0].into_iter());
    })
}

/// `deepseek2`: `n_head` heads over latent keys that are `kv_lora` and `n_rot` wide; queries come from `q_lora` numbers, or from the
/// residual stream where that is 0. The first `n_dense` of the layers are dense, the others have experts.
pub fn latent(
    n_head: usize,
    [kv_lora, n_rot, q_lora]: [usize; 3],
    [n_layer, n_dense]: [usize; 2],
    types: &[GgmlType],
) -> GgufFile {
    let (nope, value) = (32, 64);
    let head = nope + n_rot;
    let numbers = [
        ("attention.head_count", n_head),
        ("attention.head_count_kv", 1),
        ("attention.key_length", kv_lora + n_rot),
        ("attention.value_length", kv_lora),
        ("attention.key_length_mla", head),
        ("attention.value_length_mla", value),
        ("attention.q_lora_rank", q_lora),
        ("attention.kv_lora_rank", kv_lora),
        ("rope.dimension_count", n_rot),
        ("leading_dense_block_count", n_dense),
        ("expert_feed_forward_length", 32),
        ("expert_count", 4),
        ("expert_used_count", 2),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
    ];
    let mut d = Draft::new("deepseek2", n_layer, &numbers);
    for il in 0..n_layer {
        let attention: [(&str, &[usize]); 7] = [
            ("attn_norm.weight", &[N_EMBD]),
            ("attn_kv_a_mqa.weight", &[N_EMBD, kv_lora + n_rot]),
            ("attn_kv_a_norm.weight", &[kv_lora]),
            ("attn_k_b.weight", &[nope, kv_lora, n_head]),
            ("attn_v_b.weight", &[kv_lora, value, n_head]),
            ("attn_output.weight", &[n_head * value, N_EMBD]),
            ("ffn_norm.weight", &[N_EMBD]),
        ];
        d.add(il, &attention);
        if q_lora > 0 {
            let queries: [(&str, &[usize]); 3] = [
                ("attn_q_a.weight", &[N_EMBD, q_lora]),
                ("attn_q_a_norm.weight", &[q_lora]),
                ("attn_q_b.weight", &[q_lora, n_head * head]),
            ];
            d.add(il, &queries);
        } else {
            d.add(il, &[("attn_q.weight", &[N_EMBD, n_head * head])]);
        }
        d.add_ffn(il, if il < n_dense { 0 } else { 4 }, false);
    }
    d.write(types, |b| {
        b.f32("deepseek2.expert_weights_scale", 1.0)
            .bool("deepseek2.expert_weights_norm", true);
    })
}

/// `falcon-h1` of two layers: attention beside a state space of `n_head` heads in `n_group` groups, `dim` wide, over `d_state` columns.
pub fn state_space([n_head, dim, n_group, d_state]: [usize; 4], types: &[GgmlType]) -> GgufFile {
    let numbers = [
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 64),
        ("attention.value_length", 64),
        ("rope.dimension_count", 64),
        ("ssm.conv_kernel", 4),
        ("ssm.state_size", d_state),
        ("ssm.group_count", n_group),
        ("ssm.time_step_rank", n_head),
        ("ssm.inner_size", n_head * dim),
    ];
    let mut d = Draft::new("falcon-h1", 2, &numbers);
    for il in 0..2 {
        d.add_attention(il, [2, 1, 64]);
        d.add(il, &[("ffn_norm.weight", &[N_EMBD])]);
        d.add_mamba2(il, [n_head, dim, n_group, d_state]);
        d.add_ffn(il, 0, false);
    }
    d.write(types, |_| {})
}

/// `nemotron_h_moe`: a state space, experts without gates that read and give `latent` numbers, attention, experts again.
pub fn hybrid_experts(latent: usize, types: &[GgmlType]) -> GgufFile {
    let ssm = [4, 32, 2, 64];
    let numbers = [
        ("attention.head_count", 2),
        ("attention.key_length", 64),
        ("attention.value_length", 64),
        ("ssm.conv_kernel", 4),
        ("ssm.state_size", ssm[3]),
        ("ssm.group_count", ssm[2]),
        ("ssm.time_step_rank", ssm[0]),
        ("ssm.inner_size", ssm[0] * ssm[1]),
        ("expert_count", 6),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", 64),
        ("expert_shared_feed_forward_length", 96),
        ("moe_latent_size", latent),
    ];
    let arch = "nemotron_h_moe";
    let mut d = Draft::new(arch, 4, &numbers);
    let n = "feed_forward_length";
    d.numbers.retain(|(name, _)| *name != n);
    d.add(0, &[("attn_norm.weight", &[N_EMBD])]);
    d.add_mamba2(0, ssm);
    d.add_attention(2, [2, 1, 64]);
    for il in [1, 3] {
        let experts: [(&str, &[usize]); 9] = [
            ("attn_norm.weight", &[N_EMBD]),
            ("ffn_gate_inp.weight", &[N_EMBD, 6]),
            ("exp_probs_b.bias", &[6]),
            ("ffn_latent_down.weight", &[N_EMBD, latent]),
            ("ffn_latent_up.weight", &[latent, N_EMBD]),
            ("ffn_up_exps.weight", &[latent, 64, 6]),
            ("ffn_down_exps.weight", &[64, latent, 6]),
            ("ffn_up_shexp.weight", &[N_EMBD, 96]),
            ("ffn_down_shexp.weight", &[96, N_EMBD]),
        ];
        d.add(il, &experts);
    }
    d.write(types, |b| {
        b.i32s(&format!("{arch}.{n}"), [0, 64, 0, 64].into_iter())
            .i32s(
                &format!("{arch}.attention.head_count_kv"),
                [0, 0, 1, 0].into_iter(),
            )
            .bool(&format!("{arch}.expert_weights_norm"), true);
    })
}

/// `lfm2`: short convolutions over `d_conv` tokens in all layers but the second.
pub fn short_conv(d_conv: usize, types: &[GgmlType]) -> GgufFile {
    let numbers = [
        ("attention.head_count", 2),
        ("rope.dimension_count", N_EMBD / 2),
        ("shortconv.l_cache", d_conv),
    ];
    let mut d = Draft::new("lfm2", 4, &numbers);
    d.tensors[1].0 = "token_embd_norm.weight".to_owned();
    let head = N_EMBD / 2;
    for il in 0..4 {
        if il == 1 {
            d.add_attention(il, [2, 1, head]);
            let norms: [(&str, &[usize]); 2] = [
                ("attn_q_norm.weight", &[head]),
                ("attn_k_norm.weight", &[head]),
            ];
            d.add(il, &norms);
        } else {
            let conv: [(&str, &[usize]); 4] = [
                ("attn_norm.weight", &[N_EMBD]),
                ("shortconv.in_proj.weight", &[N_EMBD, 3 * N_EMBD]),
                ("shortconv.conv.weight", &[d_conv, N_EMBD]),
                ("shortconv.out_proj.weight", &[N_EMBD, N_EMBD]),
            ];
            d.add(il, &conv);
        }
        d.add(il, &[("ffn_norm.weight", &[N_EMBD])]);
        d.add_ffn(il, 0, false);
    }
    d.write(types, |b| {
        b.i32s("lfm2.attention.head_count_kv", [0, 1, 0, 0].into_iter());
    })
}

/// `smallthinker`, whose routers read what comes into a layer.
pub fn routed_experts(types: &[GgmlType]) -> GgufFile {
    let numbers = [
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", N_EMBD / 2),
        ("expert_count", 6),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", 64),
    ];
    let mut d = Draft::new("smallthinker", 2, &numbers);
    for il in 0..2 {
        d.add_attention(il, [2, 1, N_EMBD / 2]);
        d.add(il, &[("ffn_norm.weight", &[N_EMBD])]);
        d.add_experts(il, 6, 64);
    }
    d.write(types, |_| {})
}

/// `deci`: layers with attention, without, or with a matrix in its place, and feed-forward blocks of different widths, or none.
pub fn layers_of_different_widths(types: &[GgmlType]) -> GgufFile {
    let (head, n_ff) = (64, [96, 64, 32, 0, 128]);
    let numbers = [("rope.dimension_count", head)];
    let mut d = Draft::new("deci", n_ff.len(), &numbers);
    let key = "feed_forward_length";
    d.numbers.retain(|(name, _)| *name != key);
    for (il, n_ff) in n_ff.into_iter().enumerate() {
        match il {
            1 => {}
            2 => {
                let matrix: [(&str, &[usize]); 2] = [
                    ("attn_norm.weight", &[N_EMBD]),
                    ("attn_output.weight", &[N_EMBD, N_EMBD]),
                ];
                d.add(il, &matrix);
            }
            _ => d.add_attention(il, [4, 2, head]),
        }
        if n_ff > 0 {
            let block: [(&str, &[usize]); 4] = [
                ("ffn_norm.weight", &[N_EMBD]),
                ("ffn_gate.weight", &[N_EMBD, n_ff]),
                ("ffn_up.weight", &[N_EMBD, n_ff]),
                ("ffn_down.weight", &[n_ff, N_EMBD]),
            ];
            d.add(il, &block);
        }
    }
    d.write(types, |b| {
        b.i32s(&format!("deci.{key}"), n_ff.iter().map(|n| *n as i32))
            .i32s("deci.attention.head_count", [4, 0, 4, 4, 4].into_iter())
            .i32s("deci.attention.head_count_kv", [2, 0, 0, 2, 2].into_iter());
    })
}

/// A decoder of four layers that has what its architecture makes of one: norms ahead of blocks and behind them, over heads or over all of them,
/// factors, means taken off, windows, other activations.
pub fn decoder(arch: &'static str, types: &[GgmlType]) -> GgufFile {
    let (n_head, n_kv, head, n_layer) = (4, 2, 64, 4);
    let is = |names: &[&str]| names.contains(&arch);
    let mut numbers = vec![
        ("attention.head_count", n_head),
        ("attention.head_count_kv", n_kv),
        ("attention.key_length", head),
        ("attention.value_length", head),
        (
            "rope.dimension_count",
            if is(&["glm4"]) { 32 } else { head },
        ),
    ];
    if is(&["granitemoe", "minimax-m2"]) {
        numbers.extend([("expert_count", 6), ("expert_used_count", 2)]);
        numbers.push(match arch {
            "granitemoe" => ("expert_shared_feed_forward_length", 32),
            _ => ("expert_feed_forward_length", 64),
        });
    }
    if is(&["cohere2", "gemma3", "olmo2"]) {
        numbers.push(("attention.sliding_window", 24));
    }
    let mut d = Draft::new(arch, n_layer, &numbers);
    for il in 0..n_layer {
        d.add_attention(il, [n_head, n_kv, head]);
        let mut norms = vec![];
        if is(&["glm4", "gemma3", "exaone4", "olmo2"]) {
            norms.extend([
                ("post_attention_norm.weight", N_EMBD),
                ("post_ffw_norm.weight", N_EMBD),
            ]);
        }
        if !is(&["exaone4", "olmo2", "cohere2"]) {
            norms.push(("ffn_norm.weight", N_EMBD));
        }
        if is(&["hunyuan-dense", "apertus", "exaone4", "gemma3"]) {
            norms.extend([("attn_q_norm.weight", head), ("attn_k_norm.weight", head)]);
        }
        if is(&["minimax-m2", "olmo2"]) {
            norms.extend([
                ("attn_q_norm.weight", n_head * head),
                ("attn_k_norm.weight", n_kv * head),
            ]);
        }
        for (name, n) in norms {
            d.add(il, &[(name, &[n])]);
        }
        let (up, down): ([usize; 2], [usize; 2]) = ([N_EMBD, N_FF], [N_FF, N_EMBD]);
        match arch {
            "arcee" | "apertus" => {
                d.add(il, &[("ffn_up.weight", &up), ("ffn_down.weight", &down)]);
            }
            "glm4" => d.add(
                il,
                &[
                    ("ffn_up.weight", &[N_EMBD, 2 * N_FF]),
                    ("ffn_down.weight", &down),
                ],
            ),
            "minimax-m2" => {
                d.add_experts(il, 6, 64);
                d.add(il, &[("exp_probs_b.bias", &[6])]);
            }
            "granitemoe" => {
                d.add_experts(il, 6, N_FF);
                d.add_shared_expert(il);
            }
            _ => d.add_ffn(il, 0, false),
        }
    }
    if is(&["exaone4", "olmo2"]) {
        d.tensors
            .retain(|(name, _)| !name.ends_with("attn_norm.weight"));
    }
    d.write(types, |b| {
        let mut float = |name: &str, x: f32| {
            b.f32(&format!("{arch}.{name}"), x);
        };
        match arch {
            "cohere2" => {
                float("logit_scale", 0.25);
                float("attention.layer_norm_epsilon", 1e-5);
            }
            // What rotates grows, which a norm behind it takes back.
            "hunyuan-dense" => float("rope.scaling.attn_factor", 1.3),
            "granite" | "granitemoe" => {
                float("embedding_scale", 3.0);
                float("residual_scale", 0.5);
                float("logit_scale", 4.0);
                float("attention.scale", 0.1);
            }
            "minimax-m2" => {
                b.u32("minimax-m2.expert_gating_func", 2);
            }
            "apertus" => {
                for (name, x) in [
                    ("alpha_n", 0.2),
                    ("alpha_p", 0.6),
                    ("beta", 0.5),
                    ("eps", -1e-6),
                ] {
                    let all = (0..n_layer).map(|il| x * (1.0 + 0.1 * il as f32));
                    b.f32s(&format!("xielu.{name}"), all);
                }
            }
            _ => {}
        }
    })
}
