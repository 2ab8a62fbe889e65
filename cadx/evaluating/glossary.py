"""What the words of a report mean that a clinician need not know."""

import re

from cadx.reporting import Page

WORDS = {
    "AP": "average precision: the mean, over all scores at which boxes may be called, of how many of them are right",
    "AURC": "area under the risk-coverage curve; see there",
    "attention": "how much each place of a picture weighs in the answer, as the network itself says",
    "bias": "what is added to the network's outputs before they become probabilities; fitted on the calibration split",
    "bias corrected": "the interval was moved by as much as the drawn values lie above the one of all patients",
    "bootstrap": "patients are drawn again and again out of those that there are; how far the value moves makes the "
    "interval",
    "bundle": "the folder that holds a trained model, its threshold and all that it takes to use it",
    "calibration split": "patients who were neither trained on nor tested on; thresholds and probabilities are set on "
    "them",
    "centred": "the drawn values were shifted until their mean was the value of all patients",
    "COCO": "a collection of pictures by whose rules found objects are scored",
    "conservative": "the interval is rather too wide than too narrow",
    "DeLong": "the interval of an AUC whose images are of different patients",
    "effective n": "images of one patient resemble each other: they count as fewer than they are",
    "EMA": "the mean of the weights over the last steps of training",
    "epochs": "passes over the training data",
    "Grad-CAM": "where a small change of what the network sees would change its answer most",
    "Holm": "a correction of p values: the more comparisons, the smaller one has to be",
    "IoU": "the area that two boxes share, divided by the area that they cover together",
    "log scale": "the interval was made of logarithms, so that it cannot reach below 0",
    "logit": "the logarithm of p / (1 - p); intervals made of it stay between 0 and 1",
    "McNemar": "the p value of two models on the same cases: only cases count that one of them alone answers rightly",
    "MOVER": "the interval of a mean or a ratio, put together from the intervals of its parts",
    "nats": "the unit of a surprise measured with natural logarithms: 0.69 of them are a toss of a coin",
    "Newcombe": "the interval of an AUC of 0 or 1, where the usual ones have no width",
    "Obuchowski": "the interval of an AUC where patients have several images",
    "operating point": "the threshold at which a class is called, with what it reaches",
    "percentile": "the interval holds the middle 95 % of the drawn values",
    "Poisson": "the limit of how many there may be where none was seen",
    "sandwich": "an error that stays right where images of one patient resemble each other",
    "seed": "the number that starts a training run's random choices; runs of other seeds differ by chance alone",
    "SHA-256": "a file's fingerprint: another one as soon as a single byte differs",
    "Tango": "the interval of a difference of two shares of the same cases",
    "temperature": "what the network's outputs are divided by before they become probabilities; fitted on the "
    "calibration split",
    "test split": "patients kept apart until the recipe was frozen",
    "too few": "cases, errors or patients are so few that the interval is only roughly one of 95 %, or cannot be told",
    "Wald": "the interval reaches 1.96 errors to both sides",
    "Wilson": "the interval of a share; it stays between 0 and 1, also where all or none are right",
}
"""Word -> its meaning, as the other words of a report understand it."""


def show_glossary(page: Page) -> None:
    """Add the section that says what the words of the page mean; last, so that it knows them all."""
    said = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.html(), flags=re.DOTALL)
    # The longest first: where "bias corrected" is said, "bias" is not.
    words = "|".join(map(re.escape, sorted(WORDS, key=len, reverse=True)))
    found = set(re.findall(rf"\b(?:{words})\b", said))
    page.section("Words")
    page.table(
        [{"word": word, "what it means here": meaning} for word, meaning in WORDS.items() if word in found]
    )
