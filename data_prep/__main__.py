"""Command line of data preparation: ``python -m data_prep``."""

import sys
from collections.abc import Sequence

from anchor import log
from anchor.errors import exit_on_user_error
from data_prep.options import parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one command; a user error prints one line and exits with code 2."""
    args = parse(arguments)
    log.setup()
    with exit_on_user_error():
        # Import commands here, so that --help and a wrong option answer at once.
        if args.command == "pack":
            from data_prep.packing.pack import pack

            pack(args.recipe, args.overrides, args.workers, args.part)
        elif args.command == "merge":
            from data_prep.packing.pack import merge

            merge(args.recipe, args.overrides, args.workers)
        elif args.command == "inspect":
            from data_prep.inspection.inspect import inspect

            inspect(args.folder, verify_all=args.verify, show=args.show, as_json=args.json, png=args.png)
        elif args.command == "decontaminate":
            from data_prep.decontamination.decontaminate import decontaminate

            decontaminate(
                args.pairs,
                args.against,
                args.output,
                overlap=args.overlap,
                ngram_words=args.ngram_words,
                min_words=args.min_words,
                examples=args.examples,
                as_json=args.json,
            )
        elif args.command == "mine":
            from data_prep.mining.mine import mine
            from data_prep.mining.ranking import Window

            window = Window(
                negatives=args.negatives,
                first_rank=args.ranks[0],
                last_rank=args.ranks[1],
                seed=args.seed,
                margin=args.margin,
                relative_margin=args.relative_margin,
            )
            mine(args.pairs, args.output, window, as_json=args.json, model=args.model, device=args.device)
        elif args.command == "respond":
            from data_prep.responses.respond import Options, respond

            given = {name: value for name, value in vars(args).items() if name not in ("command", "json", "questions")}
            respond(Options(questions=tuple(args.questions), **given), as_json=args.json)
        elif args.command == "teach":
            from data_prep.teaching.teach import teach

            teach(
                args.shards,
                args.output,
                teacher=args.teacher,
                prompt=args.prompt,
                normalize=args.normalize,
                batch_size=args.batch_size,
                part=args.part,
                device=args.device,
            )
        else:
            from data_prep.documentation.docs import write_docs

            write_docs(
                args.output,
                args.packages,
                heldout_pairs=args.heldout_pairs,
                heldout_documents=args.heldout_documents,
                max_pairs=args.max_pairs,
                seed=args.seed,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
