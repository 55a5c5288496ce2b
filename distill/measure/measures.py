"""Everything that is measured of a model beside its teacher, but for quality on a run's own held-out sequences."""

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Recipe
from ..data.corpus import Corpus
from ..data.packed import PackedDataset
from ..run.records import Cost, Measures, TextQuality
from .answers import exact_match, read_questions
from .cost import DECODED, measure_cost
from .held_out import HeldOut
from .recall import TASKS, measure_recall
from .tasks import check_tasks, measure_tasks

Texts = dict[tuple[str, int], PackedDataset]  # by source ("": all of them) and length


def held_out_texts(
    recipe: Recipe, whole: PackedDataset, of_source: Callable[[str], Corpus], say: Callable[[str], None]
) -> Texts:
    """Held-out text by source, where there are several, and by further lengths. What has less than one sequence is left
    out, and said.

    Args:
        whole: all of it.
        of_source: reads one source alone.
    """
    data, wanted = recipe.data, {}
    for source in data.heldout if len(data.heldout) > 1 else []:
        parts = source.rstrip("/").split("/")
        tails = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))  # as short as tells it from those before
        name = next((tail for tail in tails if tail and (tail, data.length) not in wanted), source)
        wanted[name, data.length] = of_source(source)
    wanted |= {("", length): whole.corpus for length in recipe.evaluate.lengths}
    texts = {}
    for (name, length), corpus in wanted.items():
        if len(corpus.tokens) >= length:
            texts[name, length] = PackedDataset(corpus, length)
        else:
            what = name or "the held-out text"
            say(f"evaluate: {what} has {len(corpus.tokens):,} tokens, less than a sequence of {length:,}: left out")
    return texts


def check_measures(recipe: Recipe, whole: PackedDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RunError for a length too short for recall and for tasks that are not known, DataError for questions that
    are none. Lengths that are longer than all the text, or than the model takes, are left out later."""
    settings = recipe.evaluate
    if settings.questions:
        read_questions(settings.questions)
    if settings.tasks:
        check_tasks(settings.tasks, settings.tasks_folder)
    for task in settings.recall:
        for length in settings.recall_lengths:
            if length <= len(whole.corpus.tokens):
                TASKS[task](tokenizer, whole.corpus.tokens, length, settings.recall_items, 0)


class Measuring:
    """The same measures of any model, called with it.

    Args:
        whole: the held-out text, which texts for recall are cut from.
        texts: of `held_out_texts`.
        teacher: that predictions are compared with; None: with none.
        model: one of those that are measured, for the longest text that it takes.
        say: takes a line about what is left out.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        whole: PackedDataset,
        texts: Texts,
        teacher: PreTrainedModel | None,
        model: PreTrainedModel,
        say: Callable[[str], None],
    ):
        settings, self.tokenizer, self.haystack = recipe.evaluate, tokenizer, whole.corpus.tokens
        self.settings, self.questions = settings, read_questions(settings.questions) if settings.questions else []
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)

        def within(what: str, lengths: Iterable[int], most: int | None, who: str) -> list[int]:
            lengths = dict.fromkeys(lengths)
            if most is not None and (beyond := [str(length) for length in lengths if length > most]):
                say(f"evaluate: {what} at {', '.join(beyond)} tokens is left out: {who} {most:,}")
            return [length for length in lengths if most is None or length <= most]

        model_takes, text = "the model takes", len(self.haystack)
        recall = within("recall", settings.recall_lengths if settings.recall else [], longest, model_takes)
        self.recall_lengths = within("recall", recall, text, "the held-out text has")
        room = None if longest is None else longest - DECODED
        self.cost_lengths = within("cost", settings.cost_lengths, room, "with tokens to follow, " + model_takes)
        lengths = within("quality", (length for _, length in texts), longest, model_takes)
        tokens = settings.sequences * recipe.data.length  # of each text, whatever the length of its sequences
        self.texts = {
            key: HeldOut(dataset, max(1, tokens // key[1]), tokenizer, teacher)
            for key, dataset in texts.items()
            if key[1] in lengths
        }

    def __call__(self, model: PreTrainedModel) -> Measures:
        settings = self.settings
        recall = list(dict.fromkeys(settings.recall)), self.recall_lengths, settings.recall_items
        tasks = settings.tasks, settings.tasks_folder, settings.tasks_limit
        return Measures(
            texts=[TextQuality(*key, held_out.measure(model)) for key, held_out in self.texts.items()],
            recall=measure_recall(model, self.tokenizer, self.haystack, *recall),
            tasks=measure_tasks(model, self.tokenizer, *tasks) if settings.tasks else [],
            questions=exact_match(model, self.tokenizer, self.questions),
            costs=self.costs(model),
        )

    def costs(self, model: PreTrainedModel) -> list[Cost]:
        """What the model takes in time and memory, by length."""
        return [measure_cost(model, length) for length in self.cost_lengths]
