"""`python -m train experiment=tiny`: start a run, or go on with it."""

from recipes.compose import run_cli


def main() -> None:
    """Entry point; everything heavy is imported behind it."""
    from train.run import run

    run_cli(run, "train", all_stages=True)


if __name__ == "__main__":  # Megatron's checkpoint workers import this module again
    main()
