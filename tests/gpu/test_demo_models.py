"""The embedded models on the fast path (FlashInfer, captured graphs, bfloat16) against plain torch in float32; eager against captured."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from model_driver import Driver, make_runner

from workers.parallel import Communicator
from workers.step import ALL_LOGPROBS, SamplingSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
SCORED = SamplingSettings(temperature=0.0, num_logprobs=ALL_LOGPROBS, num_prompt_logprobs=ALL_LOGPROBS)
GREEDY = SamplingSettings(temperature=0.0)


def run(name: str, prompts: list[list[int]], **settings: object) -> Driver:
    """Prompts in chunks beside decoding rows, then captured steps, then a row on another's pages."""
    driver = Driver(
        make_runner(DEMO / name, Communicator.single("cuda:0"), block_size=64 if name == "mla" else 16, kv_memory_bytes=1 << 30, **settings)
    )
    driver.add(1, prompts[0], SCORED)
    driver.add(2, prompts[1], SCORED)
    driver.prefill([1], 300)
    driver.step({1: 1, 2: 100})
    driver.prefill([2], 333)
    driver.add(3, prompts[2], GREEDY)
    driver.prefill([3])
    driver.decode([1, 2, 3], 40)
    block = driver.block_size
    driver.add(4, prompts[0], SCORED, cached=(driver.pages[1][: 256 // block], 256))
    driver.prefill([4])
    return driver


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    ids = tokenizers.Tokenizer.from_file(str(DEMO / "gqa" / "tokenizer.json")).encode(Path(np.__file__).read_text()).ids
    return [ids[:900], ids[500:1250], ids[1000:1017]]


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_fast_path_agrees_with_plain_float32(name, prompts):
    exact = run(name, prompts, dtype="float32", attention_backend="torch_paged")
    plain = run(name, prompts, dtype="bfloat16", attention_backend="torch_paged")
    fast = run(name, prompts, dtype="bfloat16", attention_backend="flashinfer")
    eager = run(name, prompts, dtype="bfloat16", attention_backend="flashinfer", cuda_graphs=False)
    for row, length in ((1, 900), (2, 750)):
        drift = np.abs(plain.scores(row)[:length] - exact.scores(row)[:length]).mean()
        for each in (fast, eager):
            difference = np.abs(each.scores(row)[:length] - exact.scores(row)[:length]).mean()
            print(f"{name} row {row}: mean difference of logprobs {difference:.4f}, plain bfloat16 {drift:.4f}")
            assert difference < 2 * drift + 1e-3
    warm = np.abs(fast.scores(4) - fast.scores(1)[256 : 256 + len(fast.scores(4))]).mean()
    print(f"{name}: warm against cold {warm:.4f}")
    assert warm < 2 * drift + 1e-3
    for row in (1, 2, 3):
        known, length = exact.known[row], len(prompts[row - 1])
        same = next((i for i, (a, b) in enumerate(zip(known, fast.known[row], strict=True)) if a != b), len(known))
        print(f"{name} row {row}: {same - length} of {len(known) - length} greedy tokens equal")
        assert same > length + 1
