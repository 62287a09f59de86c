"""Why a method stays behind, where the literature says so: (names of cases, tasks, the reason with its source)."""

from __future__ import annotations

from benchmarks.methods_cases import CLASSES, NEW, TOLD

_PROMPTS = (
    "prefix",
    "prefix, projected",
    "prompt",
    "multitask-prompt",
    "p-tuning",
    "p-tuning, LSTM",
    "p-tuning, in the prompt",
)

REASONS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        _PROMPTS,
        (NEW,),
        "What stands in front of the input biases what attention adds and cannot change what it attends to "
        "within the input: it elicits what the base can do, and may not teach what needs new patterns of "
        "attention (Petrov et al., 2023, arXiv 2310.19698). Whether a new task needs them goes by the base: the "
        "small one's prompts learn this one. Keys and values that a perceptron computes get further in as many steps "
        "than the same ones trained by themselves (`prefix, projected`; Li and Liang, 2021, arXiv 2101.00190). Those "
        "come to 56 % of `reverse-next` at `--learning-rate 0.1` (in 500 steps), which may be too much where keys and "
        "values are smaller than here (1 to 5). Prompt tuning comes level with fine-tuning at billions of parameters "
        "only (Lester et al., 2021, arXiv 2104.08691)",
    ),
    (
        ("bitfit", "ln", "ia3"),
        (NEW, TOLD),
        "A vector a layer rescales or shifts features that are there, and makes no new ones. BitFit is level "
        "with full fine-tuning on small and middling data alone (Zaken et al., 2022, arXiv 2106.10199), and "
        "this base has biases at queries, keys and values only",
    ),
    (
        ("layers",),
        (NEW, TOLD),
        "What the frozen first layers do not find, the last ones cannot use: which layers are worth training "
        "goes by what has changed, the first ones for a change of the input (Lee et al., 2022, arXiv "
        "2210.11466). That the last quarter is nearly enough (Lee et al., 2019, arXiv 1911.03090) was seen in "
        "models of 12 and 24 layers; here it is two of four",
    ),
    (
        ("ladder",),
        (NEW, TOLD),
        "The side network is a transformer that starts from random weights and sees some thousand rows; the paper's "
        "starts from weights cut out of the base (Sung et al., 2022, arXiv 2206.06522)",
    ),
    (
        ("head",),
        (CLASSES,),
        "A linear layer on what the frozen base says of the last token, for the others to be compared with: features "
        "of another task's training serve where tasks are near (Peters et al., 2019, arXiv 1903.05987)",
    ),
    (
        ("houlsby, AdapterDrop",),
        (NEW, TOLD),
        "Served without the first layer's adapters, one of four here; the paper leaves out up to five of twelve "
        "(Rueckle et al., 2021, arXiv 2010.11918). What is asked for in another way needs early layers most, as under "
        "`layers`",
    ),
    (
        ("pfeiffer", "fusion"),
        (NEW, TOLD),
        "One bottleneck a layer, behind the feed-forward: half of `houlsby`, and the weaker place and form of those "
        "that He et al. (2022, arXiv 2110.04366) compare. `fusion` weighs what such members give (Pfeiffer et al., "
        "2020, arXiv 2005.00247)",
    ),
)

RATES = """\
## Rates that were tried

On `reverse-next` of `base` in 500 steps, half of the table's, where 14 of 29 rows reach 80 % of LoRA's 98 % with their
defaults; once each, as all of this is; what differs by a few answers is level:

* `ln` 78 % with its default, 77 % at 6e-2, 76 % at 8e-2, 67 % at 0.1, 54 % at 2.8e-2.
* `pfeiffer` 75 %; 74 % at 5.6e-3, 73 % at 7.5e-3, 59 % at 1.1e-2, 57 % at 2.8e-3. First values of two and a half times
  the size give 74 %, AdapterHub's for BERT 74 %, a norm in front (`--ln-before`) 11 %. Houlsby et al. (2019, arXiv
  1902.00751) try 3e-5 to 3e-3 at width 1024, Hu et al. (2023, arXiv 2304.01933) take 3e-4 at 4096; the default is
  1.4e-3 and 3.4e-4 there.
* `fusion` 71 % with its default (2e-4 here, 6.5e-5 at width 768, where AdapterHub takes 5e-5); 78 % at 4e-4, 76 % at
  7e-4, 42 % at 2.8e-3. Its members bound it. In the table's 1000 steps its loss jumps at 4.7e-4 and it comes to 51 %.
* `diffpruning` 88 %; 63 % at 2.8e-3, 82 % at 5.9e-3, 93 % at 6e-3, 81 % at 1.2e-2. At 5.9e-3 `reverse` comes to
  91 % only.
* `ia3` 68 %; 66 % at 6e-2. `prefix, projected` 63 %; 59 % at 1.5e-3 and 52 % at 1e-2.
* `layers` 51 %; 65 % at 2.3e-3 and 70 % at 4.6e-3, two and four times its default, which is 7e-5 at width 4096.
"""
"""What a search found that the tables do not show."""
