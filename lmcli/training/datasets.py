"""From files to documents: the sources of a run, their mixture, and the validation split."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lmcli.config import TrainConfig
from lmcli.data import diagnostics, documents, examples, splits
from lmcli.data.byte_ranges import Document, Documents
from lmcli.data.documents import SPLIT_SEED, DocumentFormat
from lmcli.data.files import display_name, expand, pin_absolute
from lmcli.data.rows import TABLES, file_format, named_roles
from lmcli.data.samplers import MixtureSampler
from lmcli.data.schema import SOURCE_TARGET, TEXT_LABEL_FIELDS
from lmcli.errors import UsageError, UserError, did_you_mean
from lmcli.text.characters import counted
from lmcli.training.schedules import EVALUATED_BYTES

MIN_TOKENS = 32  # of a text to train on
MIN_SHARE = 1e-5  # the smallest weight of a source, as a share of all weights
MAX_LISTED_FIELDS = 20


@dataclass(frozen=True)
class SourceShare:
    """One source of a mixture: the user's name for it, its number of files, its weight."""

    name: str
    files: int
    weight: float


@dataclass(frozen=True)
class Source:
    """Where a run's text comes from, as `recipe.yaml` stores it: absolute files and their format.

    `hashes` is the SHA-256 of each file once they have been read. `on_long` says what happens to
    examples longer than the context: truncate, skip or error. With `shares` the files belong to
    several sources, one after the other, from which rows are drawn by weight. `split_seed` is that
    of the hash by which documents are held out; None: every tenth, as in runs without a seed.
    """

    files: list[str]
    validation_files: list[str]
    doc_format: DocumentFormat
    hashes: dict[str, str] = field(default_factory=dict)
    on_long: str = "truncate"
    shares: list[SourceShare] = field(default_factory=list)
    split_seed: int | None = SPLIT_SEED

    def facts(self) -> dict:
        """Plain values for `recipe.yaml`."""
        return {
            "files": self.files,
            "validation_files": self.validation_files,
            "documents": self.doc_format.documents,
            "format": self.doc_format.format,
            "fields": list(self.doc_format.fields),
            "label": self.doc_format.label,
            "several": self.doc_format.multi_label,
            "paired": self.doc_format.paired,
            "answers": self.doc_format.answers,
            "keep_marks": self.doc_format.keep_marks,
            **({"chat": True} if self.doc_format.chat else {}),
            "on_error": self.doc_format.on_error,
            "on_long": self.on_long,
            **({} if self.split_seed is None else {"split_seed": self.split_seed}),
            "sha256": self.hashes,
            **({"shares": [asdict(share) for share in self.shares]} if self.shares else {}),
        }

    def files_by_share(self) -> list[list[str]]:
        """The files of each source; all in one list if there is no mixture."""
        remaining = iter(self.files)
        return [[next(remaining) for _ in range(share.files)] for share in self.shares] or [
            self.files
        ]


def source_from_facts(facts: dict) -> Source:
    """The Source that `facts` came from."""
    doc_format = DocumentFormat(
        facts["documents"],
        facts["format"],
        tuple(facts["fields"]),
        facts["on_error"],
        facts.get("label", ""),
        facts.get("several", False),
        facts.get("paired", False),
        facts.get("answers", ""),
        facts.get("keep_marks", True),  # of a run before this was stored
        facts.get("chat", False),
    )
    return Source(
        list(facts["files"]),
        list(facts["validation_files"]),
        doc_format,
        dict(facts["sha256"]),
        facts.get("on_long", "truncate"),
        [SourceShare(**share) for share in facts.get("shares", [])],
        facts.get("split_seed"),
    )


def open_sources(
    arguments: tuple[str, ...],
    val: tuple[str, ...],
    doc_format: DocumentFormat,
    include: str | None,
    note: Callable[[str], None],
    on_long: str = "truncate",
    targets: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    weights: tuple[float, ...] = (),
) -> Source:
    """The Source of DATA… and --val; `note` gets what is left out.

    Standard input is copied to the cache, and so are parallel files, whose `targets` belong to
    DATA… and to --val. With `weights`, one for each of DATA…, rows are drawn in that proportion.
    """
    # the files
    if weights:
        files, skipped, shares = _expand_mixture(arguments, weights, include)
    else:
        (files, skipped), shares = expand(arguments, include), []
    if skipped:
        note(f"{skipped} files that are not UTF-8 text left out")
    validation_files = expand(val)[0] if val else []
    # parallel files
    if any(targets):
        files, validation_files = (
            examples.pin_parallel_files(sources, target_files)
            for sources, target_files in zip((files, validation_files), targets)
        )
        doc_format = replace(doc_format, **examples.PARALLEL_FORMAT)
    return Source(
        list(map(pin_absolute, files)),
        list(map(pin_absolute, validation_files)),
        doc_format,
        on_long=on_long,
        shares=shares,
    )


def _expand_mixture(
    arguments: tuple[str, ...], weights: tuple[float, ...], include: str | None
) -> tuple[list[str], int, list[SourceShare]]:
    """(files, how many were left out as not text, the shares) of DATA… with a weight each.

    Raises UsageError unless there is one weight for each source, none of them tiny.
    """
    if len(weights) != len(arguments):
        raise UsageError(
            f"{len(weights)} weights for {len(arguments)} sources of data",
            where="--weights",
            hint="give one for each DATA, in order: lm train a.txt b.jsonl --weights 3,1",
        )
    if min(weights) < MIN_SHARE * sum(weights):
        raise UsageError(
            f"{min(weights):g} is less than {MIN_SHARE:g} of all weights",
            where="--weights",
            hint="leave that source out, or give it more",
        )
    expanded = [expand((argument,), include) for argument in arguments]
    shares = [
        SourceShare(argument, len(files), weight)
        for argument, weight, (files, _) in zip(arguments, weights, expanded)
    ]
    return [file for files, _ in expanded for file in files], sum(n for _, n in expanded), shares


@dataclass(frozen=True)
class FirstRows:
    """The first rows of the data ([] for plain text), and how the files are read.

    The fields of `doc_format` are those of the command line: names in order, or ROLE=NAME. `learns`
    says what learns from what, `command` is the command line so far, both for messages.
    `may_classify`: labels would be learned if a field were named for them.
    """

    rows: list[dict]
    doc_format: DocumentFormat
    file: str
    note: Callable[[str], None]
    multi_label: bool = False
    command: str = "lm train DATA"
    learns: str = ""
    may_classify: bool = False

    @cached_property
    def row(self) -> dict:
        """All fields of the rows, each with its first value."""
        row: dict = {}
        for each in self.rows:
            row = {**row, **{name: value for name, value in each.items() if name not in row}}
        return row

    @cached_property
    def named(self) -> dict[str, tuple[str, ...]]:
        """The fields that are named as ROLE=NAME, by their role; {} if they are named in order.

        Raises UsageError if only some have a role.
        """
        fields = self.doc_format.fields
        named = named_roles(fields, self.row)
        without = [name for name in fields if not named_roles([name], self.row)]
        if named and without:
            with_role = next(name for name in fields if name not in without)
            raise UsageError(
                f"{with_role!r} names a role and {without[0]!r} does not",
                where="--fields",
                hint="write ROLE=NAME for all of them, or all names in order",
            )
        return named

    @property
    def names(self) -> Collection[str]:
        """What shows the task: the roles, else the named fields, else all fields of the rows."""
        return self.named or self.doc_format.fields or self.row

    def fields(self, roles: tuple[str, ...], many_first: bool = False) -> tuple[str, ...]:
        """The fields of these roles: those named, else the fields that are called like the roles.

        With `many_first` the first role may have several. Raises UsageError with a command that
        works: for plain text, and where a field is missing.
        """
        if not self.rows:
            advice = diagnostics.hidden_rows(self.file)
            raise UsageError(
                f"{self.learns}, and this is plain text",
                where=self.location,
                hint=f"it {advice}" if advice else "give JSON Lines, TSV or CSV; --format names it",
            )
        given, named = self.doc_format.fields, self.named
        if unknown := next((role for role in named if role not in roles), ""):
            raise self._wrong_fields(f"{unknown!r} is no role here", roles)
        names = given or roles
        if named:
            names = tuple(name for role in roles for name in named.get(role, (role,)))
        twice = any(len(named.get(role, ())) > 1 for role in roles[many_first:])
        if twice or len(names) < len(roles) or (len(names) > len(roles) and not many_first):
            raise self._wrong_fields(",".join(given), roles)
        if given:
            self.require(names, roles)
        elif not set(names) <= self.row.keys():
            raise self.missing(roles)
        return names

    def require(self, names: Iterable[str], roles: tuple[str, ...] = ()) -> None:
        """Raises UsageError, with the nearest name, unless the rows have fields of these names."""
        for name in names:
            if name not in self.row:
                what = f"no {self._kind[:-1]} {name!r}{did_you_mean(name, self.row)}"
                option = f"; try {diagnostics.fields_option(self.rows, roles)}" if roles else ""
                raise UsageError(what, where=self.location, hint=self._listed + option)

    def missing(self, roles: tuple[str, ...]) -> UsageError:
        """The error for rows without the fields of these roles, with a command that works."""
        command = f"{self.command} {diagnostics.fields_option(self.rows, roles)}"
        hint = f"name the {self._kind}: {command}"
        if self.may_classify and len(roles) == 1 and len(self.row) > 1:
            kinds = {"a classifier": TEXT_LABEL_FIELDS, "a translator": SOURCE_TARGET}
            label = diagnostics.guess_fields(self.rows, TEXT_LABEL_FIELDS).get("label", "")
            if diagnostics.seems_label(self.rows, label):
                del kinds["a translator"]
            options = {name: diagnostics.fields_option(self.rows, kinds[name]) for name in kinds}
            commands = [f"{name}: {self.command} {option}" for name, option in options.items()]
            hint = "; ".join([*commands, f"a language model: {command}"])
        return UsageError(f"{self.learns}; {self._listed}", where=self.location, hint=hint)

    def note_unread(self, read: Sequence[str]) -> None:
        """Notes what a language model reads of the rows if that is not all, and what it does not.

        Names the command that would learn labels if a field seems to have some.
        """
        unread = [name for name in self.row if name not in read]
        if not unread and len(read) == 1:
            return
        text = f"a language model of {' + '.join(map(repr, read))}"
        text += " as one text" if len(read) > 1 else ""
        if unread:
            text += f"; not read: {', '.join(map(repr, unread[:MAX_LISTED_FIELDS]))}"
        guess = diagnostics.guess_fields(self.rows, TEXT_LABEL_FIELDS)
        text_field, label = (guess.get(role, "") for role in TEXT_LABEL_FIELDS)
        if label == "label" or diagnostics.seems_label(self.rows, label):
            words = [] if self.may_classify else ["--preset classify"]
            if (text_field, label) != TEXT_LABEL_FIELDS or self.doc_format.fields:
                words.append(diagnostics.fields_option(self.rows, TEXT_LABEL_FIELDS))
            text += f"; {' '.join(words)} learns labels"
        self.note(text)

    @property
    def location(self) -> str:
        """The file in messages."""
        return display_name(self.file)

    def _wrong_fields(self, what: str, roles: tuple[str, ...]) -> UsageError:
        option = diagnostics.fields_option(self.rows, roles)
        return UsageError(
            f"{what}: {self.learns}", where="--fields", hint=f"{self._listed}; try {option}"
        )

    @property
    def _kind(self) -> str:
        return "columns" if file_format(self.file, self.doc_format.format) in TABLES else "fields"

    @property
    def _listed(self) -> str:
        names = list(map(repr, self.row))
        more = ", …" if names[MAX_LISTED_FIELDS:] else ""
        place = " in its first line" if self._kind == "columns" else ""
        return f"{self._kind}{place}: {', '.join(names[:MAX_LISTED_FIELDS])}{more}"


@dataclass(frozen=True)
class Split:
    """The training and the validation documents; of these `measured` are evaluated.

    `source` has the hash of each file. `held_out` are the validation documents of each source. With
    a mixture, `per_source` has the training documents of each of its sources.
    """

    source: Source
    training: Documents
    validation: Documents
    measured: Documents
    held_out: list[Documents]
    per_source: list[Documents] = field(default_factory=list)


def split(source: Source, validation_bytes: int, note: Callable[[str], None]) -> Split:
    """Reads all files once and splits their documents; about `validation_bytes` are evaluated.

    0 bytes stand for EVALUATED_BYTES, as nothing is known of the run yet (see `measure_fewer`).

    Raises UserError for empty text, and if a file differs from what `source.hashes` records.
    """
    doc_format, seed = source.doc_format, source.split_seed
    surveys: list[documents.Survey] = []
    training, validation = [], []
    # each source has its own validation split
    for files in source.files_by_share():
        surveys.append(documents.survey(files, doc_format, seed or 0))
        if source.validation_files:
            training.append(surveys[-1].documents)
        else:
            rest, held_out = splits.split(surveys[-1], doc_format, seed)
            training.append(rest)
            validation.append(held_out)
    if source.validation_files:
        surveys.append(documents.survey(source.validation_files, doc_format, seed or 0))
        validation.append(surveys[-1].documents)
    if not doc_format.has_examples and (size := sum(each.bytes for each in training)) < MIN_TOKENS:
        raise UserError(
            f"only {size} bytes, too few tokens to train on",
            where=display_name(source.files[0]),
            hint=f"at least {MIN_TOKENS} are needed: give more text",
        )
    hashes = {file: sha256 for survey in surveys for file, sha256 in survey.hashes.items()}
    _require_unchanged(source.hashes, hashes)
    # what was skipped, and the sizes
    if skipped := sum(survey.skipped for survey in surveys):
        note(f"{counted(skipped, 'bad record')} left out")
    if empty := sum(survey.empty for survey in surveys):
        what = "side" if doc_format.paired else "text"
        note(f"{counted(empty, 'row')} with an empty {what} left out")
    result = Split(
        replace(source, hashes=hashes),
        Documents.joined(training),
        Documents.joined(validation),
        splits.limit_each(validation, doc_format, validation_bytes or EVALUATED_BYTES, seed),
        validation,
        training if source.shares else [],
    )
    note(_sizes(result, doc_format))
    return result


def measure_fewer(split: Split, validation_bytes: int, note: Callable[[str], None]) -> Split:
    """The split with about `validation_bytes` evaluated, if these are fewer; `note` gets that."""
    if split.measured.bytes <= validation_bytes:
        return split
    doc_format, seed = split.source.doc_format, split.source.split_seed
    measured = splits.limit_each(split.held_out, doc_format, validation_bytes, seed)
    if measured.bytes >= split.measured.bytes:
        return split
    note(
        f"{measured.bytes:,} bytes of the validation set are measured, so that this takes less "
        "than a tenth of the run (train.validation_bytes)"
    )
    return replace(split, measured=measured)


def _require_unchanged(known: dict[str, str], hashes: dict[str, str]) -> None:
    for file, sha256 in known.items():
        if hashes.get(file) != sha256:
            raise UserError(
                "has changed since the run began",
                where=file,
                hint="a run resumes on the same data; use --from to train further on other data",
            )


def _sizes(split: Split, doc_format: DocumentFormat) -> str:
    held_out, measured = split.validation.bytes, split.measured.bytes
    text = (
        f"{kind(doc_format, len(split.training))}, {split.training.bytes:,} bytes to train on; "
        f"{held_out:,} bytes held out"
    )
    if measured < held_out:
        text += f", {measured:,} of them measured (train.validation_bytes)"
    return text


def kind(doc_format: DocumentFormat, count: int | None = None) -> str:
    """What the documents of a format are called, with the fields that are read; counted or not."""
    name, fields = "document", doc_format.fields
    if doc_format.paired:
        name = "conversation" if doc_format.chat else "pair"
    elif doc_format.label:
        name, fields = "labeled text", (*fields, doc_format.label)
    elif doc_format.answers:
        name, fields = "question", (*fields, doc_format.answers)
    names = f"{name}s" if count is None else counted(count, name)
    return names if name == "document" else f"{names} ({' + '.join(fields)})"


def ranges(documents_: Documents) -> list[dict]:
    """Documents as `recipe.yaml` stores them: for each file its byte ranges, "0-120 240-360"."""
    by_file: dict[str, list[str]] = {}
    for document in documents_:
        by_file.setdefault(document.file, []).append(f"{document.start}-{document.end}")
    return [{"file": file, "ranges": " ".join(spans)} for file, spans in by_file.items()]


def from_ranges(stored: list[dict]) -> Documents:
    """The documents that `ranges` stored."""
    return Documents.of(
        Document(entry["file"], *map(int, span.split("-")))
        for entry in stored
        for span in entry["ranges"].split()
    )


def validation_documents(facts: dict, stored: list[dict]) -> tuple[Documents, DocumentFormat]:
    """The validation documents that a run's `recipe.yaml` names, with their format.

    Raises UserError if a file is missing or has changed.
    """
    source = source_from_facts(facts)
    files = [entry["file"] for entry in stored]
    for file in files:
        if not Path(file).is_file():
            raise UserError("the validation text no longer exists", where=file)
    hashes = documents.survey(files, source.doc_format).hashes
    _require_unchanged({file: source.hashes[file] for file in files}, hashes)
    return from_ranges(stored), source.doc_format


def planned_rows(train: TrainConfig, per_epoch: int) -> int:
    """How many rows a run will read by its budgets; 0 if only time limits it."""
    rows_per_step = max(1, train.batch_tokens // train.context)
    budgets = [
        train.steps * rows_per_step if train.steps else 0,
        -(-train.tokens // train.context) if train.tokens else 0,
        round(train.epochs * per_epoch) if train.epochs else 0,
    ]
    return min((rows for rows in budgets if rows), default=0)


def _mixture_sampler(rows: object) -> MixtureSampler | None:
    sampler = getattr(rows, "sampler", None)
    return sampler if isinstance(sampler, MixtureSampler) else None


def drawn_rows(shares: Sequence[SourceShare], rows: object, count: int) -> list[dict]:
    """Rows and epochs of each source of a mixture in the first `count` rows of a run."""
    if (sampler := _mixture_sampler(rows)) is None:
        return []
    return [
        {"name": share.name, "rows": drawn, "epochs": round(drawn / spans.per_epoch, 3)}
        for share, spans, drawn in zip(shares, sampler.samplers, sampler.counts(count))
    ]


def mixture_lines(shares: Sequence[SourceShare], rows: object, count: int) -> Iterator[str]:
    """A line for each source of a mixture: its share, its epochs in `count` rows (0: unknown)."""
    if (sampler := _mixture_sampler(rows)) is None:
        return
    total = sum(share.weight for share in shares)
    for share, spans, drawn in zip(shares, sampler.samplers, drawn_rows(shares, rows, count)):
        per_epoch = spans.per_epoch * total / share.weight
        epochs = (
            f"{drawn['epochs']:.3g} epochs" if count else f"every {per_epoch:,.0f} rows an epoch"
        )
        yield (
            f"{share.name}: {100 * share.weight / total:.3g} % of the rows, {epochs} "
            f"of its {len(spans.ids):,} tokens"
        )
