"""`prune` on a PEFT model: every method sees the adapted layers, as in the checkpoint with the adapter merged."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from adapters import adapted
from observed import Tiny
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftMixedModel,
    PromptTuningConfig,
    get_peft_model,
)
from test_contract import SPECS, rows_in_turn, stage

from lmms_prune import prune
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods import MethodSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT 0.19
]


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    return {}


@pytest.fixture
def pair(tiny: Tiny, pairs: dict[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    """A model with LoRA in all of its Linear layers, and the same with the adapter merged into the weights."""
    if tiny.family not in pairs:
        wrapper = adapted(tiny.model())
        pairs[tiny.family] = wrapper, copy.deepcopy(wrapper).merge_and_unload()
    return pairs[tiny.family]


def run(model: Any, tiny: Tiny, schedule: str) -> tuple[list[Any], torch.Tensor]:
    rng = random.Random(6)
    rows = [tiny.row(rng, images=n, words=4) for n in (1, 2, 0)]
    options = {"samples": ["a", "b", "c"], "questions": rows_in_turn(rows)}
    with torch.no_grad(), prune(model, schedule, **options) as trace:
        logits = model(**tiny.batch(rows), logits_to_keep=1).logits
    return [row.indices(0) for row in trace.rows], logits


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_methods_keep_what_they_keep_of_the_merged_checkpoint(
    tiny: Tiny, pair: tuple[Any, Any], spec: MethodSpec
) -> None:
    wrapper, merged = pair
    (kept, logits), (kept_merged, logits_merged) = (run(model, tiny, stage(spec, 2)) for model in (wrapper, merged))
    assert kept == kept_merged
    torch.testing.assert_close(logits, logits_merged)
    assert "generate" not in vars(wrapper.get_base_model())
    # The adapter matters: without it the answers are others.
    with wrapper.disable_adapter():
        _, plain = run(wrapper, tiny, stage(spec, 2))
    assert not torch.allclose(plain, logits, rtol=1e-3)


LINEAR = {"target_modules": ["q_proj", "v_proj", "k_proj", "down_proj"]}
KINDS = {
    "rslora": LoraConfig(r=2, use_rslora=True, **LINEAR),
    "dora": LoraConfig(r=2, use_dora=True, **LINEAR),
    "rank pattern": LoraConfig(r=2, rank_pattern={"layers.1.self_attn.q_proj": 4}, **LINEAR),
    "modules to save": LoraConfig(r=2, modules_to_save=["lm_head"], **LINEAR),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1, **LINEAR),
    "ia3": IA3Config(feedforward_modules=["down_proj"], **LINEAR),
    "loha": LoHaConfig(r=2, **LINEAR),
    "lokr": LoKrConfig(r=2, **LINEAR),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(tiny: Tiny, kind: str) -> None:
    wrapper = adapted(tiny.model(), copy.deepcopy(KINDS[kind]))
    merged = copy.deepcopy(wrapper).merge_and_unload()
    schedule = "divprune@0:0.8,dart@2:0.5,fastv@3:0.2"
    (kept, logits), (kept_merged, logits_merged) = (run(model, tiny, schedule) for model in (wrapper, merged))
    assert kept == kept_merged
    torch.testing.assert_close(logits, logits_merged)
    assert not torch.allclose(logits, run(tiny.model(), tiny, schedule)[1], rtol=1e-3)


def test_generate_of_the_wrapper_is_pruned(tiny: Tiny, pair: tuple[Any, Any]) -> None:
    """PEFT's own generate(), adapter merged into the layers and not, against the merged checkpoint's."""
    wrapper, merged = pair
    inputs = tiny.batch([tiny.row(random.Random(1), images=1, words=4)])
    answers = []
    for model in (wrapper, merged):
        with prune(model, "dart@1:0.5,fastv@3:0.2") as trace:
            answers.append(model.generate(**inputs, max_new_tokens=6, do_sample=False))
        assert trace.rows[0].kept[-1][0] < trace.rows[0].visual_tokens / 3
    folded = copy.deepcopy(wrapper)
    folded.merge_adapter()
    with prune(folded, "dart@1:0.5,fastv@3:0.2"):
        answers.append(folded.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[2], answers[1])


def test_an_empty_schedule_changes_no_bit(tiny: Tiny, pair: tuple[Any, Any]) -> None:
    inputs = tiny.batch([tiny.row(random.Random(2), images=1, words=4)])
    with torch.no_grad():
        plain = pair[0](**inputs).logits
        with prune(pair[0], "none"):
            assert torch.equal(pair[0](**inputs).logits, plain)


def refused(model: Any, config: Any) -> str:
    wrapper = get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(UnsupportedModelError) as error, prune(wrapper, "random@2:0.5"):
        pass
    return str(error.value)


def test_adapters_that_act_outside_of_layers_are_refused_by_name(tiny: Tiny) -> None:
    hidden = tiny.model().config.text_config
    sizes = {"num_layers": 2, "token_dim": hidden.hidden_size, "num_attention_heads": 4}
    prompt = refused(tiny.model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **sizes))
    assert "of the kind PROMPT_TUNING, which is not supported; supported: LORA, ADALORA" in prompt
    invoked = refused(tiny.model(), LoraConfig(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM", **LINEAR))
    assert "alora_invocation_tokens=[3, 4] is not supported: PEFT's own generate()" in invoked


def test_a_mixed_model_is_refused_with_what_to_give(tiny: Tiny) -> None:
    wrapper = PeftMixedModel(copy.deepcopy(tiny.model()), LoraConfig(r=2, **LINEAR))
    message = r"PeftMixedModel is a wrapper around a model; pass the model inside it"
    with pytest.raises(UnsupportedModelError, match=message), prune(wrapper, "random@2:0.5"):
        pass
