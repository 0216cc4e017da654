"""The cost calculator: the published figures, the formulas against real models of every shape, the command."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import DeepseekV4Config

from opd.__main__ import compose, main
from opd.config import ConfigError, ModelConfig
from opd.cost import (
    CacheBytes,
    DeepseekV32,
    Layout,
    cache_bytes,
    cost_of,
    count_flops,
    count_weights,
    entry_bytes,
    index_key_bytes,
    layer_cache_bytes,
    page_tokens,
    published_config,
    run_cost,
)
from opd.kernels.products import Linear
from opd.model import DeepseekV4, new_v4
from opd.model.transformer import CSA, HCA, WINDOW_ONLY, num_parameters, v4_config

ROOT = Path(__file__).parent.parent
MILLION = 1 << 20
FLASH, PRO, V32 = published_config("v4_flash"), published_config("v4_pro"), DeepseekV32()
OWN = sorted(path.stem for path in (ROOT / "conf" / "model").glob("v4_*.yaml"))


def shape(name: str, **changes: Any) -> DeepseekV4Config:
    """The config of conf/model/<name>.yaml, with a vocabulary of 8192 if the file leaves that to the tokenizer."""
    fields = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["config"]
    return v4_config({"vocab_size": 8192, "num_nextn_predict_layers": 0, **fields, **changes})


def on_meta(config: DeepseekV4Config) -> DeepseekV4:
    with torch.device("meta"):
        return DeepseekV4(config, "experts")


# --- parameters -------------------------------------------------------------------------------------------------------

ODD = {"hidden_size": 96, "q_lora_rank": 40, "o_lora_rank": 24, "hc_mult": 3, "n_routed_experts": 5, "index_n_heads": 3}
SHAPES = [
    *((name, {}) for name in OWN),
    ("v4_tiny", {**ODD, "num_experts_per_tok": 3, "index_head_dim": 48, "vocab_size": 777}),
    ("v4_tiny", {"layer_types": [WINDOW_ONLY] * 4, "hc_mult": 1}),
    ("v4_small", {"sliding_window": 48, "compress_rates": {CSA: 6, HCA: 40}, "head_dim": 48, "mlp_layer_types": None}),
]


@pytest.mark.parametrize(("name", "changes"), SHAPES)
def test_every_parameter_is_counted_once_and_where_it_belongs(name: str, changes: dict[str, Any]) -> None:
    config = shape(name, **changes)
    model, weights = on_meta(config), count_weights(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "the shapes take no memory"
    sizes = {key: (parameter.numel(), parameter.ndim) for key, parameter in model.named_parameters()}
    routed = sum(size for key, (size, _) in sizes.items() if ".mlp.experts." in key)
    wide = r"lm_head|o_a_proj|compressor\.(indexer\.)?(kv|gate)_proj|weights_proj|mlp\.gate\.weight|\.fn$|hc_fn$"
    assert weights.total == num_parameters(model)
    assert weights.embedding == sizes["model.embed_tokens.weight"][0]
    assert weights.bf16 == sum(size for key, (size, _) in sizes.items() if re.search(wide, key))
    experts, active = model.config.n_routed_experts, model.config.num_experts_per_tok
    assert weights.idle == routed // experts * (experts - active)
    assert weights.vectors == sum(
        size for key, (size, dims) in sizes.items() if dims == 1 or key.endswith("position_bias")
    )


def test_published_parameter_counts_are_those_without_the_prediction_block() -> None:
    flash, pro, baseline = count_weights(FLASH), count_weights(PRO), V32.weights()
    assert f"{num_parameters(on_meta(FLASH)) / 1e9:.1f}B" == f"{flash.total / 1e9:.1f}B" == "284.3B"
    assert f"{num_parameters(on_meta(PRO)) / 1e12:.2f}T" == f"{pro.total / 1e12:.2f}T" == "1.57T"
    assert f"{flash.activated / 1e9:.2f} {pro.activated / 1e9:.2f}" == "13.27 48.85"
    assert f"{baseline.total / 1e9:.0f} {baseline.activated / 1e9:.1f}" == "672 37.5"
    # The prediction block is one more window-only layer, two D x D matrices, two norms, and a head collapse and a last
    # norm of its own. With it Flash would be 291B; Pro rounds to the published 1.6T either way.
    for name, published in (("v4_flash", 291), ("v4_pro", 1599)):
        zero, one, d = (
            shape(name),
            shape(name, num_hidden_layers=1, compress_ratios=[0]),
            4096 if name == "v4_flash" else 7168,
        )
        block = count_weights(one).total - 2 * 129280 * d + 2 * d * d + 2 * d
        assert round((count_weights(zero).total + block) / 1e9) == published


def test_published_shapes() -> None:
    for config, counts in ((FLASH, [2, 21, 20]), (PRO, [0, 30, 31])):
        kinds: Any = config.layer_types
        assert [kinds.count(kind) for kind in (WINDOW_ONLY, CSA, HCA)] == counts
        assert kinds[-3:] == [CSA, HCA, CSA], "the last published entry is the prediction block's"
    theirs, ours = DeepseekV4Config(num_nextn_predict_layers=0).to_dict(), FLASH.to_dict()
    differing = {key for key in theirs if theirs[key] != ours[key]}
    assert differing == {"layer_types", "rope_parameters"}, "transformers' other defaults are V4-Flash"
    for config in (FLASH, PRO):
        rope: Any = config.rope_parameters
        assert rope["main"]["rope_type"] == "default" and rope["main"]["rope_theta"] == 10000
        assert rope["compress"]["rope_type"] == "yarn" and rope["compress"]["rope_theta"] == 160000
        assert rope["compress"]["attention_factor"] == 1.0 and rope["compress"]["factor"] == 16


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 3, 4, 127, 128, 129, MILLION])
def test_cache_bytes_at_the_edges_of_blocks(tokens: int) -> None:
    for config, layers, csa, hca in ((FLASH, 43, 21, 20), (PRO, 61, 30, 31)):
        sizes: tuple[tuple[Layout, int, int], ...] = (("packed", 584, 68), ("bf16", 1024, 256))
        for layout, entry, key in sizes:
            parts = cache_bytes(config, tokens, layout)
            assert parts.csa_entries == csa * (tokens // 4) * entry
            assert parts.index_keys == csa * (tokens // 4) * key
            assert parts.hca_entries == hca * (tokens // 128) * entry
            assert parts.window == layers * min(tokens, 128) * entry
            # Kv and gate: two series of the last 8 tokens (CSA, and its indexer at width 128), one of the last 128.
            number = 4 if layout == "packed" else 2
            ring = csa * min(tokens, 8) * 2 * (512 + 128) + hca * min(tokens, 128) * 512
            assert parts.tails == ring * 2 * number
            assert parts.total == parts.compressed + parts.window + parts.tails


def test_published_cache_ratios() -> None:
    flash, pro, baseline = (cost_of("", model, MILLION) for model in (FLASH, PRO, V32))
    assert (flash.packed, pro.packed, baseline.packed) == (3_684_958_208, 5_275_844_608, 50_402_951_168)
    assert (flash.packed / MILLION, pro.packed / MILLION, baseline.packed / MILLION) == (3514.25, 5031.4375, 48068)
    assert f"{baseline.packed / flash.packed:.2f} {baseline.packed / pro.packed:.2f}" == "13.68 9.55"
    assert f"{flash.packed / baseline.packed:.0%} {pro.packed / baseline.packed:.0%}" == "7% 10%"
    assert (flash.bf16 / MILLION, pro.bf16 / MILLION, baseline.bf16 / MILLION) == (6880, 9848, 85888)


def test_state_is_constant_once_the_window_is_full() -> None:
    flash, pro = cache_bytes(FLASH, MILLION, "packed"), cache_bytes(PRO, MILLION, "packed")
    assert (flash.window, pro.window, flash.tails, pro.tails) == (3_214_336, 4_559_872, 12_206_080, 18_710_528)
    assert cache_bytes(PRO, 128, "packed").state == pro.state > cache_bytes(PRO, 127, "packed").state
    assert cache_bytes(PRO, 0, "packed") == CacheBytes()


@pytest.mark.parametrize("name", OWN)
def test_a_cache_that_is_allocated_has_whole_pages_and_full_state(name: str) -> None:
    config = shape(name)
    page = page_tokens(config)
    full = cache_bytes(config, 4 * page + 1, "packed")
    one = cache_bytes(config, page, "packed").compressed
    for tokens, pages in ((0, 0), (1, 1), (page, 1), (page + 1, 2), (4 * page - 1, 4)):
        taken = cache_bytes(config, tokens, "packed", allocated=True)
        assert taken.compressed == pages * one and taken.state == full.state
    if name in ("v4_flash", "v4_pro"):
        entry, key = entry_bytes(config, "packed"), index_key_bytes(config, "packed")
        csa, hca = (layer_cache_bytes(config, kind, 1, "packed", allocated=True) for kind in (CSA, HCA))
        assert page == 128 and (entry, key) == (584, 68)
        assert (csa.csa_entries, csa.index_keys, hca.hca_entries) == (32 * entry, 32 * key, entry)


def test_the_parts_of_layers_are_the_cache() -> None:
    by_kind = [layer_cache_bytes(PRO, kind, 777, "packed") for kind in (CSA, HCA)]
    assert cache_bytes(PRO, 777, "packed").total == 30 * by_kind[0].total + 31 * by_kind[1].total
    assert by_kind[0].hca_entries == by_kind[1].csa_entries == by_kind[1].index_keys == 0


@pytest.mark.parametrize("name", OWN)
def test_formula_and_cache_agree_to_the_byte_for_every_model_file(name: str) -> None:
    config = shape(name)
    model = on_meta(config).bfloat16()
    for tokens in (1, 127, 128, 129, 1000, MILLION):
        packed, plain = (model.new_cache(1, tokens, layout=layout).num_bytes() for layout in ("packed", "plain"))
        assert packed == cache_bytes(config, tokens, "packed", allocated=True).total
        assert plain == cache_bytes(config, tokens, "bf16", allocated=True).total


@pytest.mark.parametrize(("kind", "ratio", "published"), [(CSA, 4, 4890 // 30), (HCA, 128, 584 / 128)])
def test_a_million_tokens_of_one_layer_of_v4_pro_allocated_for_real(kind: str, ratio: int, published: float) -> None:
    model = on_meta(shape("v4_pro", num_hidden_layers=1, compress_ratios=[ratio], vocab_size=16))
    model.lm_head = Linear(model.config.hidden_size, 16, bias=False)  # the cache goes where the head is
    cache = model.new_cache(1, MILLION, layout="packed")
    (layer,) = cache.layers
    tensors = [*layer.per_slot(), *layer.paged()]
    assert all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in layer.paged())
    assert stored == published * MILLION
    wanted = layer_cache_bytes(PRO, kind, MILLION, "packed")
    assert wanted == layer_cache_bytes(PRO, kind, MILLION, "packed", allocated=True)
    assert stored == wanted.compressed
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == cache.num_bytes() == wanted.total


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def test_published_flops_ratios_lie_in_the_bracket() -> None:
    flash, pro, baseline = (cost_of("", model, MILLION).flops for model in (FLASH, PRO, V32))
    giga = [
        [f"{part / 1e9:.1f}" for part in (each.linear, each.attention, each.indexer)] for each in (flash, pro, baseline)
    ]
    assert giga == [["26.5", "23.6", "90.2"], ["97.7", "76.7", "128.8"], ["75.0", "34.8", "1048.0"]]
    brackets = [[f"{value / 1e9:.1f}" for value in each.fp8_bracket()] for each in (flash, pro, baseline)]
    assert brackets == [["118.8", "123.6"], ["315.5", "327.6"], ["1192.5", "1196.7"]]
    for each, published, ratio in ((flash, 0.10, 9.8), (pro, 0.27, 3.7)):
        low, high = (value / whole for value, whole in zip(each.fp8_bracket(), baseline.fp8_bracket(), strict=True))
        assert low < published < high and 1 / high < ratio < 1 / low
        assert high / low < 1.04
    assert f"{flash.raw / baseline.raw:.1%} {pro.raw / baseline.raw:.1%}" == "12.1% 26.2%"


def test_flops_follow_what_a_query_can_see() -> None:
    config = shape("v4_small")  # window 64, CSA 4 with a top-k of 64, HCA 32: two, three and three layers
    per_entry, per_block = 4 * 8 * 64, 2 * 16 * 32
    before = count_flops(config, 1)
    assert (before.attention, before.indexer) == (8 * per_entry, 0)
    assert before.linear == 2 * (count_weights(config).fp8 + count_weights(config).bf16)
    for tokens in range(2, 600):
        after = count_flops(config, tokens)
        entries = 8 * (tokens <= 64) + 3 * (tokens % 4 == 0 and tokens <= 256) + 3 * (tokens % 32 == 0)
        assert after.attention - before.attention == entries * per_entry
        assert after.indexer - before.indexer == 3 * (tokens % 4 == 0) * per_block
        assert after.linear == before.linear
        before = after


# --- models of our own ------------------------------------------------------------------------------------------------


def test_sizes_of_the_models_for_real_runs() -> None:
    assert 28e6 < count_weights(shape("v4_small")).total < 33e6
    assert 140e6 < count_weights(shape("v4_base")).total < 160e6
    small, _ = compose("base", ["model=v4_small", "tokenizer.vocab_size=8192"])
    assert num_parameters(new_v4(small.model, 8192, seed=0)) == count_weights(shape("v4_small")).total


@pytest.mark.parametrize("name", OWN)
def test_every_model_file_describes_a_model_that_uses_all_its_parts(name: str) -> None:
    model: ModelConfig = compose("base", [f"model={name}"])[0].model
    config: Any = shape(name)
    ratios = [config.compress_rates[kind] for kind in (CSA, HCA)]
    assert max(ratios) <= config.sliding_window <= model.max_tokens <= config.max_position_embeddings
    assert config.index_n_heads >= 16, "with few heads many index scores are exactly zero, and ties decide"
    assert config.index_topk < config.max_position_embeddings // ratios[0], "the indexer has something to choose"
    assert config.index_head_dim % 32 == config.hidden_size % 32 == config.moe_intermediate_size % 32 == 0
    assert set(config.layer_types) >= {CSA, HCA} and set(config.mlp_layer_types) == {"hash_moe", "moe"}


# --- the command ------------------------------------------------------------------------------------------------------


def lines(*overrides: str, context: str = "1048576", out: Path | None = None) -> list[str]:
    return run_cost(compose("cost", list(overrides))[0], context, None if out is None else str(out))


def rows(printed: list[str]) -> dict[str, list[list[str]]]:
    """Name -> its cells in each table."""
    found: dict[str, list[list[str]]] = {}
    for line in printed:
        if match := re.match(r"  (V4-Flash|V4-Pro|V3\.2|this model) +(.*)", line):
            found.setdefault(match[1], []).append(re.split(r"  +", match[2]))
    return found


def test_the_tables_show_the_published_ratios() -> None:
    found = rows(lines("model=v4_pro"))
    assert list(found) == ["V4-Flash", "V4-Pro", "V3.2"], "the published model is not listed twice"
    cache, flops = found["V4-Pro"]
    assert cache[:2] == ["1.57T", "48.85B"] and cache[3:6] == ["5,031.44", "10.47%", "9.55x"] and "9.62 GiB" in cache
    assert flops[-3:] == ["26.45%", "327.6", "27.38%"]
    assert found["V4-Flash"][0][5] == "13.68x" and found["V3.2"][0][5] == "1.00x"


def test_the_users_model_has_its_line_and_follows_its_config() -> None:
    found = rows(lines("model=v4_small", "tokenizer.vocab_size=8192", context="4096"))
    assert list(found) == ["V4-Flash", "V4-Pro", "this model", "V3.2"]
    assert found["this model"][0][0] == f"{count_weights(shape('v4_small')).total / 1e6:.2f}M"
    other = rows(lines("model=v4_pro", "model.config.index_topk=512"))
    assert other["this model"][0] == other["V4-Pro"][0] and other["this model"][1] != other["V4-Pro"][1]
    assert any("max_position_embeddings=4096 is below" in line for line in lines("model=v4_small", context="4097"))
    assert "0 B" in rows(lines(context="3"))["V4-Pro"][0], "no entry is complete, and nothing is divided by"


def test_a_checkpoint_says_its_own_shape(tmp_path: Path) -> None:
    config = shape("v4_tiny", hc_mult=2)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    printed = rows(run_cost(compose("cost", [f"model.path={tmp_path}"])[0], "1024", None))
    assert printed["this model"][0][0] == f"{count_weights(config).total / 1e6:.2f}M"


def test_the_page_stands_alone_and_shows_every_model(tmp_path: Path) -> None:
    out = tmp_path / "cost.html"
    printed = lines("model=v4_small", out=out)
    page = out.read_text(encoding="utf-8")
    assert printed[-1] == str(out)
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|<script|@import""", page)
    figures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(figures) == 2
    for figure in figures:
        ET.fromstring(figure)
        assert all(f"var(--s{index})" in figure for index in range(4)) and "var(--s4)" not in figure
        assert all(f">{tick}<" in figure for tick in ("1k", "4k", "16k", "64k", "256k", "1M"))
    assert all(name in page for name in ("V4-Flash", "V4-Pro", "this model", "V3.2", "13.68x"))
    with pytest.raises(ConfigError, match=r"out=.*cost\.html is there already; .*run\.overwrite=true"):
        lines("model=v4_pro", out=out)
    assert out.read_text(encoding="utf-8") == page
    lines("model=v4_small", "run.overwrite=true", out=out)
    assert out.read_text(encoding="utf-8") == page, "the same numbers are the same page"


@pytest.mark.parametrize(
    ("overrides", "context", "out", "message"),
    [
        ([], "many", None, r"context=many is not a whole number"),
        ([], "1e6", None, r"context=1e6 is not a whole number"),
        ([], "0", None, r"context=0 is too small; it must be at least 1"),
        ([], "8", "cost.png", r"out=.*cost\.png does not end in \.html"),
        ([], "8", "nowhere/cost.html", r"out=.*nowhere is not a folder"),
        (["model=hf", "model.path=some/model"], "8", "a.html", r"model\.family=hf: .*choose deepseek_v4"),
        (
            ["model=v4_base", "model.config.sliding_window=64"],
            "8",
            "a.html",
            r"heavily_compressed_attention=128 .*_window=64",
        ),
        (
            ["model=v4_base", "model.config.sliding_window=3"],
            "8",
            "a.html",
            r"compressed_sparse_attention=4 .*_window=3",
        ),
        (["model=v4_base", "model.config.index_topk=0"], "8", "a.html", r"index_topk=0 cannot work"),
    ],
)
def test_a_refusal_names_the_key_and_writes_nothing(
    overrides: list[str], context: str, out: str | None, message: str, tmp_path: Path
) -> None:
    target = None if out is None else tmp_path / out
    with pytest.raises(ConfigError, match=message):
        lines(*overrides, context=context, out=target)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def opd(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["opd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    status, printed, _ = opd("cost", "model=v4_pro", "context=1048576")
    assert status == 0 and printed.splitlines() == lines("model=v4_pro")
    assert list(tmp_path.iterdir()) == [], "no folder of a run is made"
    assert opd("cost", "context=4096", "out=a.html")[0] == 0 and [path.name for path in tmp_path.iterdir()] == [
        "a.html"
    ]
    assert opd("cost", "out=a.html") == (
        2,
        "",
        "opd cost: out=a.html is there already; choose another name or add run.overwrite=true\n",
    )
    status, _, error = opd("check", "context=4096")
    assert status == 2 and "context" in error, "a key of this command and of no other"
