"""Names of files, runs and samples as people have them, of which no terminal and no report may obey anything."""

MARKUP = ["lr[lr=1e-4]", "a[/b]c", "[bold red]x", "x[link=example.org]y[/link]"]
CONTROL = [
    "red\x1b[31m",
    "title\x1b]0;owned\x07",
    "two\nlines",
    "back\rspace\x08",
    "\x9b31mC1",
    "\u202egnp.exe",
    "\udcff.png",
]
MARKDOWN = ["a|b.png", "<img src=x>.png", "![x](y).png", "*a*.png", "`a`.png", "_a_.png", "[a](javascript:b).png"]
