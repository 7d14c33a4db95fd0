"""MMLU: 14,042 test questions with four choices in 57 subjects, and five development questions a subject for shots.

A row is `subject`, `subcategory`, `category`, `question`, `choices` (four texts) and `answer` (0 to 3). The
17 subcategories and four categories are those of the authors' repository (`categories.py`).
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="MMLU",
    homepage="https://github.com/hendrycks/test",
    licence="MIT",
    citation="Hendrycks et al., Measuring Massive Multitask Language Understanding, ICLR 2021, arXiv:2009.03300",
    hub="cais/mmlu",
    files=("mmlu/{split}/{config}_{split}.csv",),
)

_SUBCATEGORIES = {
    "STEM": {
        "physics": ("astronomy", "college_physics", "conceptual_physics", "high_school_physics"),
        "chemistry": ("college_chemistry", "high_school_chemistry"),
        "biology": ("college_biology", "high_school_biology"),
        "computer science": (
            "college_computer_science",
            "computer_security",
            "high_school_computer_science",
            "machine_learning",
        ),
        "math": (
            "abstract_algebra",
            "college_mathematics",
            "elementary_mathematics",
            "high_school_mathematics",
            "high_school_statistics",
        ),
        "engineering": ("electrical_engineering",),
    },
    "humanities": {
        "history": (
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "prehistory",
        ),
        "philosophy": (
            "formal_logic",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "world_religions",
        ),
        "law": ("international_law", "jurisprudence", "professional_law"),
    },
    "social sciences": {
        "politics": (
            "high_school_government_and_politics",
            "public_relations",
            "security_studies",
            "us_foreign_policy",
        ),
        "culture": ("human_sexuality", "sociology"),
        "economics": ("econometrics", "high_school_macroeconomics", "high_school_microeconomics"),
        "geography": ("high_school_geography",),
        "psychology": ("high_school_psychology", "professional_psychology"),
    },
    "other": {
        "other": ("global_facts", "miscellaneous", "professional_accounting"),
        "business": ("business_ethics", "management", "marketing"),
        "health": (
            "anatomy",
            "clinical_knowledge",
            "college_medicine",
            "human_aging",
            "medical_genetics",
            "nutrition",
            "professional_medicine",
            "virology",
        ),
    },
}

# subject -> (subcategory, category)
SUBJECTS = {
    subject: (subcategory, category)
    for category, subcategories in _SUBCATEGORIES.items()
    for subcategory, subjects in subcategories.items()
    for subject in subjects
}


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits test and dev; a configuration is a subject, without one all 57 in the order of their names."""
    one_of("mmlu", "split", split, ("test", "dev"))
    subjects = sorted(SUBJECTS) if config is None else [one_of("mmlu", "config", config, SUBJECTS)]
    return [row for subject in subjects for row in _subject(data, split, subject)]


def _subject(data: Data, split: str, subject: str) -> list[dict[str, Any]]:
    subcategory, category = SUBJECTS[subject]
    about = {"subject": subject, "subcategory": subcategory, "category": category}
    local = data.csv(f"mmlu/{split}/{subject}_{split}.csv")
    if local is not None:
        return [
            {
                **about,
                "question": row["question"],
                "choices": [row[f"choice{k}"] for k in range(4)],
                "answer": int(row["answer"]),
            }
            for row in local
        ]
    found = data.from_hub("mmlu", CARD, subject, split)
    return [
        {**about, "question": row["question"], "choices": list(row["choices"]), "answer": int(row["answer"])}
        for row in found
    ]
