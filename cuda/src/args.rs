//! Arguments of the kernels, as `kernels/*.cu` declare them. Addresses are device addresses; 0 is null.

/// The one argument of a kernel.
///
/// # Safety
/// `repr(C)` without padding, the same fields as in the kernel's source, any bit pattern meaningful.
pub(crate) unsafe trait Args: Copy {
    /// The kernel's name.
    const KERNEL: &'static str;
}

macro_rules! args {
    ($($(#[$doc:meta])* $name:ident => $($kernel:ident),* { $($field:ident: $ty:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default)]
            pub(crate) struct $name { $(pub(crate) $field: $ty),* }
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$ty>())*, "padding");
        )*
        /// Every kernel.
        #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the emulator has its own table"))]
        pub(crate) const KERNELS: &[&str] = &[$($(stringify!($kernel),)*)*];
    };
}

/// Tiers of a pool at most, `pages.cuh`.
pub(crate) const MAX_TIERS: usize = 4;

args! {
    /// `rows.cu`
    Repack => repack {
        src: u64, dst: u64, n_row: u64, n_block: u32, block_bytes: u32, row_bytes: u32, n_plane: u32, chunk: u32, pad: u32, offset: [u32; 4], length: [u32; 4],
    }
    /// `rows.cu`
    Embed => embed { w: u64, tokens: u64, out: u64, row_bytes: u64, ty: u32, n_embd: u32 }
    /// `rows.cu`
    RmsNorm => rms_norm { x: u64, w: u64, bias: u64, out: u64, q: u64, ds: u64, width: u32, stride: u32, eps: f32, pad: u32 }
    /// `rows.cu`
    Quantize => quantize_rows { x: u64, q: u64, ds: u64, n_block: u64, per_row: u32, stride: u32 }
    /// `rows.cu`
    GateUp => glu { gate: u64, up: u64, n_elem: u64, kind: u32, pad: u32 }
    /// `rows.cu`
    SigmoidMul => sigmoid_mul { x: u64, gate: u64, n_elem: u64, width: u32, n_gate: u32 }
    /// `rows.cu`
    Center => center { x: u64, width: u32, pad: u32 }
    /// `rows.cu`
    SoftCap => soft_cap_all { x: u64, n_elem: u64, cap: f32, pad: u32 }
    /// `rows.cu`
    Activate => activate { x: u64, n_elem: u64, by: ActivationParams, pad: u32 }
    /// `rows.cu`
    AddScaled => add_scaled { x: u64, y: u64, n_elem: u64, factor: f32, pad: u32 }
    /// `rows.cu`
    RopeStore => rope_store {
        q: u64, k: u64, v: u64, q_norm: u64, k_norm: u64, rope_q: u64, rope_k: u64, pool_k: u64, pool_v: u64,
        places: u64, n_head: u32, n_head_kv: u32, head_dim: u32, neox: u32, eps_q: f32, eps_k: f32,
    }
    /// `rows.cu`
    ReadAll => read_all { src: u64, out: u64, n: u64 }
    /// `matvec.cu`
    MatVec => mul_mat_vec {
        seg: [Segment; 4], xf: u64, xq: u64, xds: u64, ids: u64, n_seg: u32, n_in: u32, mode: u32, per_input: u32,
    }
    /// `gemm.cu`
    MulMat => mul_mat_64, mul_mat_128 {
        w: u64, x: u64, out: u64, bias: u64, row_bytes: u64, next_w: u64, ty: u32, n_in: u32, n_out: u32, n: u32, add: u32, x_stride: u32,
        out_stride: u32, next_x: u32, next_out: u32, pad: u32,
    }
    /// `gemm_f16.cu`
    Unpack => unpack { w: u64, out: u64, row_bytes: u64, ty: u32, n_in: u32, width: u32, n_row: u32 }
    /// `gemm_f16.cu`
    ToHalf => to_half { x: u64, out: u64, order: u64, n_in: u32, width: u32, per_input: u32, pad: u32 }
    /// `gemm_f16.cu`
    MulMatF16 => mul_mat_f16, mul_mat_f16_hopper { part: [PartF16; 3], w: u64, x: u64, width: u32, n: u32, add: u32, n_part: u32 }
    /// `gemm_small.cu`
    MulMatSmall => mul_mat_small_64, mul_mat_small_128, mul_mat_small_64_hopper, mul_mat_small_128_hopper {
        w: u64, x: u64, part: u64, row_bytes: u64, ty: u32, n_in: u32, width: u32, n_out: u32, n: u32, pad: u32,
    }
    /// `gemm_small.cu`
    JoinParts => join_parts { part: u64, bias: u64, out: u64, n_part: u32, n_out: u32, n: u32, add: u32 }
    /// `experts.cu`
    MoeSort => moe_sort { ids: u64, order: u64, first: u64, first_tile: u64, tile_expert: u64, n: u32, n_expert: u32, tile: u32, pad: u32 }
    /// `experts.cu`
    MulMatExperts => mul_mat_experts_64, mul_mat_experts_128, mul_mat_experts_64_hopper, mul_mat_experts_128_hopper {
        w: u64, x: u64, order: u64, first: u64, first_tile: u64, tile_expert: u64, bias: u64, out: u64, row_bytes: u64, ty: u32, n_in: u32, width: u32,
        n_out: u32, n_expert: u32, pad: u32,
    }
    /// `pages.cuh`
    Tier => { k: u64, v: u64, ty_k: u32, ty_v: u32 }
    /// `pages.cu`
    StoreRows => store_rows { k: u64, v: u64, places: u64, tier: Tier, n_head_kv: u32, head_dim: u32, n_part: u32, pad: u32 }
    /// `pages.cu`
    MovePages => move_pages { tiers: u64, moves: u64, n_head_kv: u32, head_dim: u32 }
    /// `attention.cu`
    Attention => attention, attention_tiers {
        q: u64, pages: u64, n_pages: u64, pos: u64, out: u64, part: u64, part_ml: u64, page_ml: u64, sinks: u64, tiers: [Tier; MAX_TIERS],
        n: u32, n_head: u32, n_head_kv: u32, head_dim: u32, max_pages: u32, scale: f32, window: u32, cap: f32,
    }
    /// `attention_batch.cu`
    AttentionBatch => attention_batch, attention_batch_tiers, attention_batch_bounded, attention_batch_bounded_tiers, attention_wide {
        q: u64, pages: u64, n_pages: u64, pos: u64, out: u64, sinks: u64, tiers: [Tier; MAX_TIERS],
        n: u32, n_head: u32, n_head_kv: u32, head_dim: u32, scale: f32, window: u32, cap: f32, pad: u32,
    }
    /// `attention.cu`
    Combine => attention_combine {
        part: u64, part_ml: u64, page_ml: u64, sinks: u64, pages: u64, n_pages: u64, pos: u64, out: u64, q: u64, ds: u64, w: u64,
        n_head: u32, head_dim: u32, splits: u32, max_pages: u32, mean: u32, window: u32, few: u32, pad: u32,
    }
    /// `delta.cu`
    SplitHeads => split_heads { x: u64, first: u64, second: u64, n_elem: u64, head_dim: u32, pad: u32 }
    /// `conv.cu`
    SsmConv => ssm_conv, short_conv {
        x: u64, w: u64, bias: u64, past: u64, pos: u64, before: u64, behind: u64, out: u64, q: u64, ds: u64, n: u32, width: u32, d_conv: u32,
        pad: u32,
    }
    /// `scan.cu`
    SsmScan => ssm_scan {
        xbc: u64, dt: u64, state: u64, out: u64, pos: u64, a: u64, bias: u64, d: u64, n: u32, n_head: u32, head_dim: u32, n_group: u32,
        d_state: u32, width: u32, each: u32, pad: u32,
    }
    /// `scan.cu`
    RmsNormGroups => rms_norm_groups { x: u64, up: u64, w: u64, q: u64, ds: u64, width: u32, eps: f32 }
    /// `delta.cu`
    L2Norm => l2_norm_first { x: u64, units: u32, n_head: u32, head_dim: u32, stride: u32, eps: f32, pad: u32 }
    /// `delta.cu`
    DeltaGates => delta_gates { alpha: u64, beta: u64, a: u64, dt: u64, n_elem: u32, n_head: u32 }
    /// `delta.cu`
    DeltaNet => gated_delta_net, gated_delta_step {
        qkv: u64, alpha: u64, beta: u64, state: u64, out: u64, pos: u64, a: u64, dt: u64, n: u32, n_head_k: u32, n_head_v: u32, head_dim: u32,
        width: u32, side_by_side: u32, scale: f32, eps: f32,
    }
    /// `delta.cu`
    GatedNorm => gated_norm { x: u64, w: u64, gate: u64, q: u64, ds: u64, units: u32, head_dim: u32, eps: f32, pad: u32 }
    /// `latent.cu`
    CopyHeads => copy_heads { x: u64, out: u64, units: u32, x_next: u32, out_next: u32, x_at: u32, out_at: u32, n: u32 }
    /// `latent.cu`
    HeadsVec => mul_mat_vec_heads { m: MatVec, x_next: u32, out_next: u32 }
    /// `latent.cu`
    RotateEnds => rotate_ends {
        q: u64, k: u64, rope_q: u64, rope_k: u64, pool: u64, places: u64, n_head: u32, head_dim: u32, n_rot: u32, neox: u32,
    }
    /// `latent.cu`
    LatentAttention => attention_latent {
        q: u64, pages: u64, n_pages: u64, pos: u64, out: u64, part: u64, part_ml: u64, page_ml: u64, tiers: [Tier; MAX_TIERS],
        n: u32, n_head: u32, head_dim: u32, head_dim_v: u32, max_pages: u32, scale: f32,
    }
    /// `draw.cu`
    Draw => draw { logits: u64, next: u64, out: u64, n_vocab: u32, top_k: u32, top_p: f32, min_p: f32, inv_temp: f32, lot: f32 }
    /// `moe.cu`
    MoeRouter => moe_router, moe_choose {
        m: MatVec, ids: u64, weights: u64, arrived: u64, bias: u64, n_used: u32, norm: u32, sigmoid: u32, n_group: u32, n_group_used: u32,
        scale: f32,
    }
    /// `moe.cu`
    MoeDown => moe_down { m: MatVec, weights: u64, n_used: u32, add: u32 }
    /// `moe.cu`
    MoeSum => moe_sum { y: u64, weights: u64, acc: u64, n_used: u32, width: u32, add: u32, pad: u32 }
    /// `step.cu`
    Step => step, step_tiers, step_any, step_any_tiers {
        phases: u64, work: u64, unused: u64, arrived: u64, left: u64, part: u64, top: u64, best: u64, told: u64, follows: u64, trace: u64,
        n_unused: u32, turn: u32, n_phase: u32, n_head: u32, n_head_kv: u32, group: u32, tiles: u32, units: u32, head_dim: u32, max_pages: u32,
        max_splits: u32, neox: u32, mean: u32, pad: u32, scale: f32, n_layer: u32, n_words: u32, each: u32,
        words: Words,
    }
}

/// `matvec.cu`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segment {
    pub(crate) w: u64,
    pub(crate) row_bytes: u64,
    pub(crate) expert_bytes: u64,
    pub(crate) out: u64,
    pub(crate) bias: u64,
    pub(crate) ty: u32,
    pub(crate) n_out: u32,
}

/// A matrix of [`MulMatF16`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PartF16 {
    pub(crate) out: u64,
    pub(crate) bias: u64,
    pub(crate) n_out: u32,
    pub(crate) stride: u32,
}

/// A matrix of a [`Phase`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Matrix {
    pub(crate) w: u64,
    pub(crate) out: u64,
    pub(crate) bias: u64,
    pub(crate) add: u64,
    pub(crate) row_bytes: u64,
    pub(crate) ty: u32,
    pub(crate) n_out: u32,
    pub(crate) copies: u32,
    pub(crate) apart: u32,
    pub(crate) bytes: u32,
    pub(crate) tail: u32,
    pub(crate) jump: u32,
    pub(crate) of_row: u32,
    pub(crate) stage: u32,
    pub(crate) unit: u32,
    pub(crate) units: u32,
    pub(crate) expert_bytes: u32,
    pub(crate) pad: [u32; 2],
}

/// Rows that a warp computes in a [`Phase`], `step.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    pub(crate) w: [u64; 2],
    pub(crate) row: u32,
    pub(crate) n_row: u32,
    pub(crate) last: u32,
    pub(crate) single: u32,
    pub(crate) asks: u32,
    pub(crate) matrix: u8,
    pub(crate) ty: u8,
    pub(crate) wide: u8,
    pub(crate) slot: u8,
    pub(crate) pad: [u8; 8],
}
const _: () = assert!(size_of::<Work>() == 48, "padding");

/// What becomes of each element, `common.cuh`; nothing if `kind` is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ActivationParams {
    pub(crate) kind: u32,
    pub(crate) alpha_n: f32,
    pub(crate) alpha_p: f32,
    pub(crate) beta: f32,
    pub(crate) eps: f32,
}

/// A phase of a step, `step.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Phase {
    pub(crate) m: [Matrix; 3],
    pub(crate) src: u64,
    pub(crate) norm: u64,
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) q_norm: u64,
    pub(crate) k_norm: u64,
    pub(crate) pool_k: u64,
    pub(crate) pool_v: u64,
    pub(crate) pages: u64,
    pub(crate) out: u64,
    pub(crate) page_ml: u64,
    pub(crate) head_ml: u64,
    pub(crate) mass: u64,
    pub(crate) reach: u64,
    pub(crate) sinks: u64,
    pub(crate) logits: u64,
    pub(crate) lean: u64,
    pub(crate) plus: u64,
    pub(crate) plus_norm: u64,
    pub(crate) sum: u64,
    pub(crate) kind: u32,
    pub(crate) gated: u32,
    pub(crate) again: u32,
    pub(crate) n_in: u32,
    pub(crate) layer: u32,
    pub(crate) arrive: u32,
    pub(crate) want_f: u32,
    pub(crate) want_q: u32,
    pub(crate) eps: f32,
    pub(crate) eps_q: f32,
    pub(crate) eps_k: f32,
    pub(crate) rope: u32,
    pub(crate) next: u32,
    pub(crate) f_at: u32,
    pub(crate) q_at: u32,
    pub(crate) ds_at: u32,
    pub(crate) early: u32,
    pub(crate) experts: u32,
    pub(crate) width: u32,
    pub(crate) n_expert: u32,
    pub(crate) n_used: u32,
    pub(crate) sigmoid: u32,
    pub(crate) norm_chosen: u32,
    pub(crate) weights_scale: f32,
    pub(crate) chosen_in: u32,
    pub(crate) join_at: u32,
    pub(crate) window: u32,
    pub(crate) most_pages: u32,
    pub(crate) eps_plus: f32,
    pub(crate) scale: f32,
    pub(crate) normed: u32,
    pub(crate) center: u32,
    pub(crate) act: ActivationParams,
    pub(crate) pad: u32,
}
const _: () = assert!(size_of::<Phase>() == 3 * 96 + 21 * 8 + 38 * 4, "padding");

/// What differs between steps, `step.cuh`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words(pub(crate) [u32; Words::MAX]);

impl Words {
    pub(crate) const MAX: usize = 896;
}

impl Default for Words {
    fn default() -> Self {
        Self([0; Self::MAX])
    }
}

/// [`MulMat`] for the kernel with tiles of 128.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMat128(pub(crate) MulMat);

/// [`MulMatF16`] for the kernel of compute capability 9.0.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMatF16Hopper(pub(crate) MulMatF16);

/// [`MulMatSmall`] for the kernel with a tile of 128 tokens.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMatSmall128(pub(crate) MulMatSmall);

/// [`MulMatSmall`] for the kernel of compute capability 9.0.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMatSmallHopper(pub(crate) MulMatSmall);

/// The same with a tile of 128 tokens.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMatSmall128Hopper(pub(crate) MulMatSmall);

/// [`MulMatExperts`] for the kernel with tiles of 128 columns.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMatExperts128(pub(crate) MulMatExperts);

/// [`MulMatExperts`] for the kernel of compute capability 9.0.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMatExpertsHopper(pub(crate) MulMatExperts);

/// The same with tiles of 128 columns.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MulMatExperts128Hopper(pub(crate) MulMatExperts);

/// [`Attention`] over pages of any tier.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct AttentionTiers(pub(crate) Attention);

/// [`AttentionBatch`] over pages of any tier.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct AttentionBatchTiers(pub(crate) AttentionBatch);

/// [`AttentionBatch`] with windows and bounds of scores.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct AttentionBatchBounded(pub(crate) AttentionBatch);

/// The same over pages of any tier.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct AttentionBatchBoundedTiers(pub(crate) AttentionBatch);

/// [`AttentionBatch`] for wide heads.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct AttentionWide(pub(crate) AttentionBatch);

/// [`SsmConv`] between two gates.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct ShortConv(pub(crate) SsmConv);

/// [`MoeRouter`] whose logits are there already.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct MoeChoose(pub(crate) MoeRouter);

/// [`DeltaNet`] for one token whose inputs are as products have left them.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct DeltaStep(pub(crate) DeltaNet);

/// [`Step`] over pages of any tier.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct StepTiers(pub(crate) Step);

/// [`Step`] with what only some models have.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct StepAny(pub(crate) Step);

/// The same over pages of any tier.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct StepAnyTiers(pub(crate) Step);

macro_rules! kernels {
    ($($args:ident $name:literal),* $(,)?) => {
        $(
            // SAFETY: `repr(C)`, and the size has been checked to be that of the fields; declared as in the kernel.
            unsafe impl Args for $args {
                const KERNEL: &'static str = $name;
            }
        )*
    };
}

kernels! {
    Repack "repack", Embed "embed", RmsNorm "rms_norm", Quantize "quantize_rows", GateUp "glu", SigmoidMul "sigmoid_mul", Center "center", SoftCap "soft_cap_all", AddScaled "add_scaled", RopeStore "rope_store",
    ReadAll "read_all", MatVec "mul_mat_vec", MulMat "mul_mat_64", MulMat128 "mul_mat_128", Attention "attention",
    Combine "attention_combine", Draw "draw", MoeRouter "moe_router", MoeDown "moe_down", MoeSum "moe_sum", Step "step", AttentionBatch "attention_batch", Unpack "unpack", ToHalf "to_half", MulMatF16 "mul_mat_f16", MulMatF16Hopper "mul_mat_f16_hopper",
    MulMatSmall "mul_mat_small_64", MulMatSmall128 "mul_mat_small_128", MulMatSmallHopper "mul_mat_small_64_hopper",
    MulMatSmall128Hopper "mul_mat_small_128_hopper", JoinParts "join_parts",
    MoeSort "moe_sort", MulMatExperts "mul_mat_experts_64", MulMatExperts128 "mul_mat_experts_128",
    MulMatExpertsHopper "mul_mat_experts_64_hopper", MulMatExperts128Hopper "mul_mat_experts_128_hopper",
    StoreRows "store_rows", MovePages "move_pages", AttentionTiers "attention_tiers", AttentionBatchTiers "attention_batch_tiers",
    AttentionBatchBounded "attention_batch_bounded", AttentionBatchBoundedTiers "attention_batch_bounded_tiers", StepTiers "step_tiers",
    StepAny "step_any", StepAnyTiers "step_any_tiers", Activate "activate", SplitHeads "split_heads", SsmConv "ssm_conv", ShortConv "short_conv", SsmScan "ssm_scan", RmsNormGroups "rms_norm_groups", MoeChoose "moe_choose", L2Norm "l2_norm_first",
    DeltaGates "delta_gates", DeltaNet "gated_delta_net", DeltaStep "gated_delta_step", GatedNorm "gated_norm", CopyHeads "copy_heads", HeadsVec "mul_mat_vec_heads", RotateEnds "rotate_ends",
    LatentAttention "attention_latent", AttentionWide "attention_wide",
}
