"""``python -m hubpath_fast``: the command ``hubpath``, as torchrun starts it."""

from hubpath_command import main

if __name__ == "__main__":
    main()
