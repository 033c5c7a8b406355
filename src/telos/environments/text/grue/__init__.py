"""Six text generation tasks with rewards, after the GRUE benchmark of RL4LMs (Ramamurthy et al. 2023, "Is Reinforcement Learning (Not) for
Natural Language Processing?"), made here from grammars and from Python's own library, so that nothing is downloaded.

| testbed | GRUE's task | prompt and answer | gold | corpus metrics beside it |
|---|---|---|---|---|
| `grue-sentiment` | IMDB continuation | beginning of a review, a positive continuation | lexicon judge | – |
| `grue-concepts` | CommonGen | some words, one sentence with all of them | coverage × form and sense | BLEU, ROUGE-L, METEOR |
| `grue-summaries` | CNN/DailyMail | Python function, its docstring's summary | ROUGE-L | ROUGE-1, -2, -L, METEOR |
| `grue-qa` | NarrativeQA | short passage and question, an answer | token F1 | ROUGE-L, METEOR |
| `grue-translation` | IWSLT 2017 | a sentence, the same in a rule-based language or back | chrF | BLEU, chrF |
| `grue-dialogue` | DailyDialog | turns in a shop, the next turn | intent, topic and form | BLEU, ROUGE-L, METEOR |

ToTTo (tables to text), GRUE's further task, has no counterpart here; dialogue came into GRUE with a later version of RL4LMs.
"""

TASKS = ("grue-sentiment", "grue-concepts", "grue-summaries", "grue-qa", "grue-translation", "grue-dialogue")
