"""What a paper on a model must report, by CLAIM and by TRIPOD+AI, and which of it a run knows by itself.

The items are told in words of our own, short; their numbers are those of the published lists:

    CLAIM       Tejani et al. 2024, "Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 Update",
                Radiology: Artificial Intelligence 6:e240300
    TRIPOD+AI   Collins et al. 2024, "TRIPOD+AI statement", BMJ 385:e078378
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Item(NamedTuple):
    """One item of a checklist.

    Attributes:
        number: in the published list.
        asks: what must be reported.
        facts: names of what a run knows of it; empty where only people can say it.
    """

    number: str
    asks: str
    facts: tuple[str, ...] = ()


class Answer(NamedTuple):
    """An item with what is known of it; empty where somebody has to write it."""

    item: Item
    known: str


CLAIM: tuple[Item, ...] = (
    Item("1", "The title names the kind of model", ("subject", "model")),
    Item("2", "A structured abstract"),
    Item("3", "Clinical background, and the role that the model is to have", ("intended_use",)),
    Item("4", "Aims and hypotheses"),
    Item("5", "Prospective or retrospective"),
    Item("6", "What the study is for, such as feasibility or non-inferiority", ("gate",)),
    Item("7", "Where the data come from", ("source",)),
    Item("8", "Who was included and excluded, where and when"),
    Item("9", "Preprocessing, from the file to the network", ("preprocessing",)),
    Item("10", "Which parts of an image were used", ("preprocessing",)),
    Item("11", "How data were de-identified", ("deidentification",)),
    Item("12", "How missing data were handled", ("missing",)),
    Item("13", "How images were acquired", ("modality",)),
    Item("14", "What the reference standard is", ("classes",)),
    Item("15", "Why that reference standard"),
    Item("16", "Who annotated, and how qualified"),
    Item("17", "How the test set was annotated"),
    Item("18", "How much annotators differ"),
    Item("19", "How data were assigned to the splits", ("splits",)),
    Item("20", "At which level the splits are apart", ("disjoint",)),
    Item("21", "The intended sample size, and why", ("sample",)),
    Item("22", "The model in detail", ("model", "outputs")),
    Item("23", "Software and versions", ("software",)),
    Item("24", "How parameters were initialised", ("initialisation",)),
    Item("25", "How it was trained", ("training",)),
    Item("26", "How the final model was selected", ("selection",)),
    Item("27", "Ensembles", ("ensemble",)),
    Item("28", "The metrics of performance", ("metrics",)),
    Item("29", "Statistical uncertainty", ("intervals",)),
    Item("30", "Robustness", ("subgroups",)),
    Item("31", "How answers are explained", ("explanation",)),
    Item("32", "Evaluation on internal data", ("evaluation",)),
    Item("33", "Testing on external data", ("external",)),
    Item("34", "Registration of the trial"),
    Item("35", "How many were included and excluded", ("sample",)),
    Item("36", "Demographic and clinical characteristics by split", ("characteristics",)),
    Item("37", "Performance with its uncertainty", ("performance",)),
    Item("38", "Diagnostic performance and its precision", ("operating_point", "performance")),
    Item("39", "Which cases it gets wrong", ("failures",)),
    Item("40", "Limitations", ("limitations",)),
    Item("41", "What follows for practice", ("intended_use",)),
    Item("42", "Where the full protocol is"),
    Item("43", "Availability of software, model and data", ("availability",)),
    Item("44", "Funding, and the funders' role"),
)

TRIPOD_AI: tuple[Item, ...] = (
    Item("1", "The title says: development or evaluation, whom, which outcome", ("subject",)),
    Item("2", "A structured abstract"),
    Item("3a", "The health context, and what exists already"),
    Item("3b", "Target population and intended users", ("intended_use",)),
    Item("3c", "Known inequalities between groups"),
    Item("4", "Objectives: development, evaluation or both"),
    Item("5a", "Sources of data for development and evaluation", ("source",)),
    Item("5b", "Dates of the data"),
    Item("6a", "Setting and centres", ("characteristics",)),
    Item("6b", "Who was eligible"),
    Item("6c", "Treatments received"),
    Item("7", "Preparation and quality checks of the data", ("preprocessing", "validation")),
    Item("8a", "The outcome that is predicted", ("classes",)),
    Item("8b", "Who assessed the outcome, and how qualified"),
    Item("8c", "Blinding of those who assessed it"),
    Item("9a", "Which predictors, and why", ("modality",)),
    Item("9b", "How predictors were measured", ("preprocessing",)),
    Item("9c", "Who interpreted predictors, where interpretation is needed"),
    Item("10", "Sample size, and why", ("sample",)),
    Item("11", "Missing data", ("missing",)),
    Item("12a", "How data were used and split", ("splits", "disjoint")),
    Item("12b", "How predictors were handled", ("preprocessing",)),
    Item("12c", "Type of model, how it was built and tuned", ("model", "training", "selection")),
    Item("12d", "Heterogeneity between clusters", ("subgroups",)),
    Item("12e", "Measures of performance", ("metrics", "intervals")),
    Item("12f", "Updating of the model, such as recalibration", ("calibration",)),
    Item("12g", "How predictions are calculated", ("outputs",)),
    Item("13", "Handling of class imbalance", ("calibration",)),
    Item("14", "What was done for fairness", ("subgroups",)),
    Item("15", "What the model puts out, and its thresholds", ("outputs", "operating_point")),
    Item("16", "How development and evaluation data differ", ("external",)),
    Item("17", "Ethical approval"),
    Item("18a", "Funding"),
    Item("18b", "Conflicts of interest"),
    Item("18c", "Where the protocol is"),
    Item("18d", "Registration"),
    Item("18e", "Availability of the data", ("source",)),
    Item("18f", "Availability of the code", ("availability",)),
    Item("19", "Involvement of patients and the public"),
    Item("20a", "Flow of participants", ("sample",)),
    Item("20b", "Characteristics of participants", ("characteristics",)),
    Item("20c", "Evaluation data compared with development data", ("external",)),
    Item("21", "Participants and events in each analysis", ("sample",)),
    Item("22", "The full model, so that others can use it", ("availability",)),
    Item("23a", "Performance with intervals, in subgroups too", ("performance", "subgroups")),
    Item("23b", "Performance by cluster", ("subgroups",)),
    Item("24", "Results of updating the model", ("calibration",)),
    Item("25", "Interpretation, fairness included"),
    Item("26", "Limitations", ("limitations",)),
    Item("27a", "How poor input is dealt with", ("poor_input",)),
    Item("27b", "What users must do and know", ("intended_use",)),
    Item("27c", "Next steps"),
)


def fill(checklist: Sequence[Item], facts: Mapping[str, str]) -> list[Answer]:
    """Every item with what is known of it, joined from `facts`.

    >>> [answer.known for answer in fill(CLAIM[:3], {"intended_use": "Research."})]
    ['', '', 'Research.']
    """
    return [
        Answer(item, " ".join(facts[name] for name in item.facts if facts.get(name))) for item in checklist
    ]


def missing(answers: Sequence[Answer]) -> list[str]:
    """The numbers of the items that somebody has to write."""
    return [answer.item.number for answer in answers if not answer.known]
