"""Reference decoding of one sequence under RaaS: the oracle for what `reference_kv.py` leaves out, a table for each key and value head and
one budget for the whole model, which is how the engine runs unless told otherwise.

numpy only, one token at a time, and the books of the pool are plain lists. Keys and values of every token stay in memory; a page
that is not in its table any more is not attended to.

    scope         layer: a table a layer;  head: a table for each key and value head
    budget_scope  layer: `--pages` a table;  model: `--pages` times the tables for all of them, of which one holds four times
                  `--pages` at most.  The page that goes is then the one worth least in any table, among equals in the first.

At step t every table opens a page if it needs one, in order; only then is anything computed.  A page that exceeds `alpha` of a head's
attention gets stamp t behind the step.  The page with the oldest stamp goes, among equals the one with the least attention, then the
first; pages of the prompt and the last four of a table stay.

    python reference_pool.py --gguf ../reasoner.gguf --tokens ../../../tests/data/kv/rec-500-256-raas.jsonl --pages 16 \\
        --policy raas:alpha=0.5,scope=layer,budget_scope=model --trace rec-500-256-raas-model.jsonl
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import gguf
import numpy as np

PAGE, RECENT, MOST_SHARES = 16, 4, 4


class Model:
    """The weights of a `qwen3` file, decoded."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        field = lambda key: reader.fields["qwen3." + key].contents()
        self.w = {t.name.removesuffix(".weight"): gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        self.n_layer, self.hd = field("block_count"), field("attention.key_length")
        self.n_head, self.n_kv = field("attention.head_count"), field("attention.head_count_kv")
        self.eps, self.base = field("attention.layer_norm_rms_epsilon"), field("rope.freq_base")

    def norm(self, x, name):
        mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        return x / np.sqrt(mean + np.float32(self.eps)) * self.w[name]

    def rope(self, x, pos):
        """x: [heads, hd]; pairs are halves of a head."""
        half = self.hd // 2
        angle = pos * self.base ** (-np.arange(half) * 2.0 / self.hd)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=1)


@dataclass
class Page:
    first: int
    len: int
    stamp: int
    pinned: bool
    w: np.float32 = np.float32(0)


class Pool:
    def __init__(self, model, pages, scope, budget_scope, trace):
        self.groups = model.n_kv if scope == "head" else 1
        self.tables = [[] for _ in range(model.n_layer * self.groups)]
        self.pages, self.shared, self.trace = pages, budget_scope == "model", trace
        n_table = len(self.tables)
        self.most = min(MOST_SHARES, n_table) * pages if self.shared else pages
        self.free = [pages * n_table] if self.shared else [pages] * n_table

    def append(self, pos, pin):
        for t, table in enumerate(self.tables):
            if table and table[-1].len < PAGE:
                table[-1].len += 1
                table[-1].pinned |= pin
            else:
                self.make_room(t, pos)
                self.tables[t].append(Page(pos, 1, pos, pin or pos == 0))

    def make_room(self, t, pos):
        full = len(self.tables[t]) >= self.most
        own = 0 if self.shared else t
        if self.free[own] and not full:
            self.free[own] -= 1
            return
        asked = range(len(self.tables)) if self.shared and not full else [t]
        for recent in (RECENT, 1):
            may = [(p.stamp, float(p.w), p.first, u) for u in asked for p in self.tables[u][:-recent] if not p.pinned]
            if may:
                break
        stamp, w, first, u = min(may)
        self.tables[u] = [p for p in self.tables[u] if p.first != first]
        self.trace.append({"step": pos, "layer": u // self.groups, "head": u % self.groups, "page": first, "stamp": stamp, "w": w})


def step(m, pool, keys, values, token, pos, alpha):
    """keys, values: [layer][kv head, position, hd]."""
    x = m.w["token_embd"][token]
    group = m.n_head // m.n_kv
    for il in range(m.n_layer):
        b = f"blk.{il}."
        h = m.norm(x, b + "attn_norm")
        split = lambda name, heads: (m.w[b + name] @ h).reshape(heads, m.hd)
        q = m.rope(m.norm(split("attn_q", m.n_head), b + "attn_q_norm"), pos)
        keys[il][:, pos] = m.rope(m.norm(split("attn_k", m.n_kv), b + "attn_k_norm"), pos)
        values[il][:, pos] = split("attn_v", m.n_kv)
        y = np.empty_like(q)
        for g in range(pool.groups):
            table = pool.tables[il * pool.groups + g]
            live = np.concatenate([np.arange(p.first, p.first + p.len) for p in table])
            starts = np.cumsum([0] + [p.len for p in table[:-1]])
            heads = range(g * m.n_head // pool.groups, (g + 1) * m.n_head // pool.groups)
            most = np.zeros(len(table), np.float32)
            for i in heads:
                logits = keys[il][i // group, live] @ q[i] / np.float32(m.hd ** 0.5)
                p = np.exp(logits - logits.max())
                p /= p.sum()
                y[i] = p @ values[il][i // group, live]
                most = np.maximum(most, np.add.reduceat(p, starts))
            for page, w in zip(table, most):
                page.w = w
        x = x + m.w[b + "attn_output"] @ y.reshape(-1)
        h = m.norm(x, b + "ffn_norm")
        gate, up = m.w[b + "ffn_gate"] @ h, m.w[b + "ffn_up"] @ h
        x = x + m.w[b + "ffn_down"] @ (gate / (1 + np.exp(-gate)) * up)
    for page in (p for table in pool.tables for p in table):
        if page.w > np.float32(alpha):
            page.stamp = pos


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--tokens", required=True, help="a trace whose first line has the prompt and the reply")
    ap.add_argument("--pages", type=int, required=True)
    ap.add_argument("--policy", required=True)
    ap.add_argument("--trace", required=True)
    args = ap.parse_args()
    name, _, options = args.policy.partition(":")
    o = dict(pair.split("=") for pair in options.split(","))
    assert name == "raas"
    with open(args.tokens) as f:
        head = json.loads(f.readline())
    prompt, tokens = head["prompt"], head["prompt"] + head["reply"]
    m, evicted = Model(args.gguf), []
    pool = Pool(m, args.pages, o["scope"], o["budget_scope"], evicted)
    keys, values = (np.zeros((m.n_layer, m.n_kv, len(tokens), m.hd), np.float32) for _ in range(2))
    for pos, token in enumerate(tokens):
        pool.append(pos, pos < len(prompt))
        step(m, pool, keys, values, token, pos, float(o["alpha"]))
    with open(args.trace, "w") as f:
        f.write(json.dumps({"policy": args.policy, "page": PAGE, "recent": RECENT, "pages": args.pages, "gguf": True, "prompt": prompt,
                            "reply": head["reply"]}) + "\n")
        f.writelines(json.dumps(e) + "\n" for e in evicted)
    print(f"{len(evicted)} pages went in {len(tokens)} steps")


if __name__ == "__main__":
    main()
