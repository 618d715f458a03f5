//! `lemma quantize --imatrix`.

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};

use common::{ends, err, run, temp};
use lemma_engine::gguf::write::Builder;
use lemma_engine::gguf::{GgmlType, GgufFile};

const N_IN: usize = 1024;
const DENSE: &str = "blk.0.ffn_up.weight";
const EXPERTS: &str = "blk.0.ffn_gate_exps.weight";
const UNKNOWN: &str = "blk.0.attn_q.weight";

/// Numbers of the reference data.
fn floats(name: &str) -> Vec<f32> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/quant");
    let bytes = std::fs::read(dir.join(name)).unwrap();
    let (chunks, _) = bytes.as_chunks::<4>();
    chunks.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A folder with a model and what is known about it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let dir = temp(name);
        std::fs::create_dir_all(&dir).unwrap();
        let folder = Self(dir);
        folder.write_model();
        folder
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// A model that `llama-quantize` can read: twelve rows, three times, of which one counts as those of two experts.
    fn write_model(&self) {
        let source = bytes(&floats("source.f32.bin"));
        let mut b = Builder::new();
        b.str("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.context_length", 64)
            .u32("llama.embedding_length", N_IN as u32)
            .u32("llama.feed_forward_length", 12)
            .u32("llama.attention.head_count", 4)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .str("quantize.imatrix.file", "an older one");
        let n_rows = (source.len() / 4 / N_IN) as u64;
        b.tensor(DENSE, GgmlType::F32, &[N_IN as u64, n_rows]);
        b.tensor(EXPERTS, GgmlType::F32, &[N_IN as u64, n_rows / 2, 2]);
        b.tensor(UNKNOWN, GgmlType::F32, &[N_IN as u64, n_rows]);
        let mut body = b
            .begin(File::create(self.path("f32.gguf")).unwrap())
            .unwrap();
        for _ in 0..3 {
            body.write(&source).unwrap();
        }
        body.finish().unwrap();
    }

    /// Writes what `sums` and `counts` say of each matrix.
    fn write_importance(&self, name: &str, all: &[(&str, Vec<f32>, Vec<f32>)]) -> String {
        let mut b = Builder::new();
        b.str("general.type", "imatrix")
            .strings("imatrix.datasets", ["words.txt", "more.txt"].iter())
            .u32("imatrix.chunk_count", 30)
            .u32("imatrix.chunk_size", 512);
        for (matrix, sums, counts) in all {
            let n = counts.len() as u64;
            let shape = [sums.len() as u64 / n, n];
            b.tensor(&format!("{matrix}.in_sum2"), GgmlType::F32, &shape);
            b.tensor(&format!("{matrix}.counts"), GgmlType::F32, &[1, n]);
        }
        let path = self.path(name);
        let mut body = b.begin(File::create(&path).unwrap()).unwrap();
        for (_, sums, counts) in all {
            body.write(&bytes(sums)).unwrap();
            body.write(&bytes(counts)).unwrap();
        }
        body.finish().unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What is known of one matrix, and of one of two experts.
fn known() -> [(&'static str, Vec<f32>, Vec<f32>); 2] {
    let sums: Vec<f32> = floats("imatrix.f32.bin")
        .iter()
        .map(|v| v * 512.0)
        .collect();
    let unused = vec![0.0; N_IN];
    [
        (DENSE, sums.clone(), vec![512.0]),
        (EXPERTS, [sums, unused].concat(), vec![1536.0, 0.0]),
    ]
}

/// FNV-1a.
fn hash(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[test]
fn bytes_are_those_of_llama_quantize() {
    // Hashes of what llama-quantize makes of these files: of the matrix, of the experts, and of one that nothing is known of.
    const MADE: &[(&str, [u64; 3])] = &[
        (
            "Q4_0",
            [
                0xb6ba_18db_3e1a_072c,
                0x0e13_4593_ae39_ec6e,
                0x4709_d322_76b0_fb18,
            ],
        ),
        (
            "Q4_1",
            [
                0xb7e3_b46b_35a9_3eab,
                0x5844_ce22_0354_7346,
                0xb2e0_adb7_2e7b_263c,
            ],
        ),
        (
            "Q5_0",
            [
                0x3bf9_14f7_5e03_696c,
                0x770b_1adf_3431_aafc,
                0xca6f_3472_e3e0_a2f0,
            ],
        ),
        (
            "Q5_1",
            [
                0x7d61_e827_138c_c92d,
                0x52d2_49e8_1a0a_3101,
                0x2285_2fca_5a4e_dc1a,
            ],
        ),
        (
            "Q8_0",
            [
                0x45ca_8979_d8d5_0d9b,
                0x45ca_8979_d8d5_0d9b,
                0x45ca_8979_d8d5_0d9b,
            ],
        ),
        (
            "Q2_K",
            [
                0xb74f_689a_f5d8_f5c2,
                0x8213_aff5_3f93_a1eb,
                0x7118_8d20_a24b_6e4a,
            ],
        ),
        (
            "Q3_K_S",
            [
                0xdb7a_e5b9_8bd7_7d7d,
                0xac26_1c9c_df22_0e47,
                0xc7ed_daeb_b0df_deac,
            ],
        ),
        (
            "Q4_K_S",
            [
                0x5d31_cdd8_9486_d679,
                0xb84d_dd1f_dc9a_104c,
                0xe591_9aee_24e2_a849,
            ],
        ),
        (
            "Q5_K_S",
            [
                0xdb70_44bb_386e_b59f,
                0x57a1_ab5a_6f33_caa4,
                0x5f59_1613_bec5_5344,
            ],
        ),
        (
            "Q6_K",
            [
                0xf86c_4510_e4bc_d684,
                0x5835_37e6_d42a_76c9,
                0x6034_d657_0e49_13a3,
            ],
        ),
        (
            "IQ4_NL",
            [
                0xa09c_7b83_a005_3086,
                0x7c0c_46c0_92ed_5163,
                0x0bcb_220c_3053_516b,
            ],
        ),
        (
            "IQ4_XS",
            [
                0x7d84_ed70_1a3c_665c,
                0xa9be_1123_c85f_08c0,
                0xe5e2_62bb_d8b1_992d,
            ],
        ),
    ];
    let folder = Folder::new("importance");
    let importance = folder.write_importance("imatrix.gguf", &known());
    let model = folder.path("f32.gguf");
    for (ty, hashes) in MADE {
        let new = folder.path(&format!("{ty}.gguf"));
        let line = ["quantize", "--imatrix", &importance, &model, &new, ty];
        let o = run(&line);
        ends(&o, 0);
        let text = err(&o);
        assert!(
            text.starts_with("warning: blk.0.attn_q.weight: not in the importance matrix"),
            "{text}"
        );
        let file = GgufFile::open(Path::new(&new)).unwrap();
        for (name, expected) in [DENSE, EXPERTS, UNKNOWN].iter().zip(hashes) {
            let found = hash(file.tensor(name).unwrap().data);
            assert_eq!(found, *expected, "{name} as {ty}");
        }
        let meta = file.meta();
        assert_eq!(meta.str("quantize.imatrix.file"), Ok(&*importance));
        assert_eq!(meta.str("quantize.imatrix.dataset"), Ok("words.txt"));
        assert_eq!(meta.u32("quantize.imatrix.entries_count"), Ok(2));
        assert_eq!(meta.u32("quantize.imatrix.chunks_count"), Ok(30));
    }
}

#[test]
fn rows_and_experts_get_their_own() {
    let folder = Folder::new("importance-rows");
    let importance = folder.write_importance("imatrix.gguf", &known());
    let (model, new) = (folder.path("f32.gguf"), folder.path("new.gguf"));
    for threads in ["1", "3"] {
        let line = ["quantize", "--imatrix", &importance, &model, &new, "q3_K_S"];
        ends(&run(&[&line[..], &["-t", threads, "--force"]].concat()), 0);
        let file = GgufFile::open(Path::new(&new)).unwrap();
        let source = floats("source.f32.bin");
        let known = floats("imatrix.f32.bin");
        // What met no token has no preferences; means count, not sums.
        let third: Vec<f32> = known.iter().map(|v| v * 512.0 / 1536.0).collect();
        let even = vec![1.0; N_IN];
        let n_rows = source.len() / N_IN;
        for (name, of) in [(DENSE, [&known, &known]), (EXPERTS, [&third, &even])] {
            let t = file.tensor(name).unwrap();
            let quantize = t.ty.traits().quantize_row_weighted.unwrap();
            let size = t.ty.row_size(N_IN).unwrap();
            for (i, (x, y)) in source.chunks(N_IN).zip(t.data.chunks(size)).enumerate() {
                let mut expected = vec![0; size];
                quantize(x, of[i / (n_rows / 2)], &mut expected);
                assert!(expected == y, "{name} row {i}");
            }
        }
    }
}

#[test]
fn the_older_format_is_read() {
    let folder = Folder::new("importance-older");
    let known = floats("imatrix.f32.bin");
    let mut old = 1_i32.to_le_bytes().to_vec();
    old.extend((DENSE.len() as i32).to_le_bytes());
    old.extend(DENSE.as_bytes());
    old.extend([4_i32, N_IN as i32].iter().flat_map(|n| n.to_le_bytes()));
    old.extend(bytes(&known.iter().map(|v| v * 4.0).collect::<Vec<_>>()));
    let whole = old.len();
    old.extend(7_i32.to_le_bytes());
    old.extend(9_i32.to_le_bytes());
    old.extend(b"words.txt");
    let (path, model) = (folder.path("imatrix.dat"), folder.path("f32.gguf"));
    let new = ["old.gguf", "new.gguf"].map(|n| folder.path(n));
    std::fs::write(&path, &old).unwrap();
    ends(
        &run(&["quantize", "--imatrix", &path, &model, &new[0], "q4_K_S"]),
        0,
    );
    let sums = known.iter().map(|v| v * 2.0).collect();
    let same = folder.write_importance("imatrix.gguf", &[(DENSE, sums, vec![2.0])]);
    ends(
        &run(&["quantize", "--imatrix", &same, &model, &new[1], "q4_K_S"]),
        0,
    );
    let files = new.map(|p| GgufFile::open(Path::new(&p)).unwrap());
    for (a, b) in files[0].tensors().zip(files[1].tensors()) {
        assert!(a.data == b.data, "{}", a.name);
    }
    let meta = files[0].meta();
    assert_eq!(meta.str("quantize.imatrix.dataset"), Ok("words.txt"));
    assert_eq!(meta.u32("quantize.imatrix.chunks_count"), Ok(7));
    // One that ends too early is no file of this format; the text behind the last number may be missing.
    let write = folder.path("cut.gguf");
    for (len, code) in [(whole, 0), (whole - 1, 4), (40, 4), (5, 4), (0, 4)] {
        std::fs::write(&path, &old[..len]).unwrap();
        let line = [
            "quantize",
            "--force",
            "--imatrix",
            &path,
            &model,
            &write,
            "q4_K_S",
        ];
        let o = run(&line);
        ends(&o, code);
        assert!(code == 0 || err(&o).lines().count() <= 2, "{}", err(&o));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = Folder::new("importance-refused");
    let (model, new) = (folder.path("f32.gguf"), folder.path("new.gguf"));
    let short = (DENSE, vec![1.0; 512], vec![1.0]);
    let other = ("blk.7.ffn_up.weight", vec![1.0; N_IN], vec![1.0]);
    let number = |v: f32| {
        let mut sums = vec![1.0; N_IN];
        sums[3] = v;
        (DENSE, sums, vec![1.0])
    };
    for (name, known, code, text) in [
        (
            "short.gguf",
            vec![short],
            4,
            "512 numbers for 'blk.0.ffn_up.weight', expected 1024",
        ),
        ("other.gguf", vec![other], 2, "knows none of the matrices"),
        (
            "nan.gguf",
            vec![number(f32::NAN)],
            4,
            "NaN for 'blk.0.ffn_up.weight'",
        ),
        (
            "negative.gguf",
            vec![number(-1.0)],
            4,
            "-1 for 'blk.0.ffn_up.weight'",
        ),
        ("empty.gguf", vec![], 4, "nothing about any matrix"),
    ] {
        let path = folder.write_importance(name, &known);
        let o = run(&["quantize", "--imatrix", &path, &model, &new, "q4_K_S"]);
        ends(&o, code);
        assert!(err(&o).contains(text), "{}", err(&o));
        assert!(!Path::new(&new).exists());
    }
    let line = ["quantize", "--imatrix", &model, &model, &new, "q4_K_S"];
    ends(&run(&line), 4);
    let line = ["quantize", "--imatrix", "/no/such", &model, &new, "q4_K_S"];
    ends(&run(&line), 3);
}
