"""More ways to tell, change and ask for the facts of the built-in dialogues. Plain data.

For ``data.generator.wordings: many`` (:mod:`rxlm.data.wordings`): how people write to a program,
with contractions, American spelling and greetings. Rules as in ``facts``; wordings that are held
out of training there are not here either.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MoreWordings:
    """What is added to one kind of fact; ``{}`` stands for the value."""

    subject: str
    """What the fact is about, for the patterns that suit every kind ("what's my name?")."""
    statements: tuple[str, ...]
    updates: tuple[str, ...]
    questions: tuple[str, ...]


SUBJECT_STATEMENTS = (
    "remember that {subject} is {}.",
    "please remember: {subject} is {}.",
    "I want you to know that {subject} is {}.",
)
SUBJECT_UPDATES = ("no, {subject} is {}.", "sorry, {subject} is {}.", "{subject} is {} now.")
SUBJECT_QUESTIONS = (
    "what's {subject}?",
    "do you know {subject}?",
    "do you still know {subject}?",
    "can you tell me {subject}?",
    "tell me {subject}.",
    "what was {subject}?",
    "what did I say {subject} is?",
)


def _animal(name: str) -> MoreWordings:
    return MoreWordings(
        subject=f"the name of my {name}",
        statements=(
            f"my {name}'s name is {{}}.",
            f"my {name} is named {{}}.",
            f"I have a {name} named {{}}.",
            f"I have a {name}, {{}}.",
            f"I've got a {name} called {{}}.",
            f"we call our {name} {{}}.",
        ),
        updates=(
            f"I have a new {name}, {{}}.",
            f"my {name} is called {{}} now.",
            f"we call our {name} {{}} now.",
        ),
        questions=(
            f"what is my {name}'s name?",
            f"what's my {name}'s name?",
            f"what's my {name} called?",
            f"how is my {name} called?",
            f"what do I call my {name}?",
        ),
    )


def _taste(name: str, verb: str, doing: str) -> MoreWordings:
    return MoreWordings(
        subject=f"my favorite {name}",
        statements=(
            f"my favorite {name} is {{}}.",
            f"I like {doing} {{}} most.",
            f"I like to {verb} {{}} best.",
            f"the best {name} is {{}}.",
            f"nothing is better to {verb} than {{}}.",
        ),
        updates=(
            f"my favorite {name} is {{}} now.",
            f"now I like {doing} {{}} most.",
            f"now I like to {verb} {{}} best.",
        ),
        questions=(
            f"what is my favorite {name}?",
            f"what's my favourite {name}?",
            f"which {name} do I like best?",
            f"what {name} do I like most?",
        ),
    )


MORE_WORDINGS: dict[str, MoreWordings] = {
    "name": MoreWordings(
        subject="my name",
        statements=(
            "I'm {}.",
            "my name's {}.",
            "this is {}.",
            "call me {}.",
            "my friends call me {}.",
            "everyone calls me {}.",
        ),
        updates=("call me {} now.", "I am {} now.", "people call me {} now."),
        questions=(
            "what am I called?",
            "how am I called?",
            "who am I again?",
            "what do people call me?",
            "do you know who I am?",
        ),
    ),
    "city": MoreWordings(
        subject="the city I live in",
        statements=(
            "I'm living in {}.",
            "I live in the city of {}.",
            "we live in {}.",
            "my house is in {}.",
            "my place is in {}.",
            "I have a house in {}.",
        ),
        updates=("I have moved to {}.", "we moved to {}.", "I've just moved to {}."),
        questions=(
            "which city do I live in?",
            "in which city do I live?",
            "where am I living?",
            "where do I live again?",
            "do you know where I live?",
        ),
    ),
    "dog": _animal("dog"),
    "cat": _animal("cat"),
    "colour": MoreWordings(
        subject="my favorite color",
        statements=(
            "my favorite color is {}.",
            "the color I like most is {}.",
            "I like the color {} best.",
            "of all colors I like {} best.",
            "of all colours I like {} most.",
        ),
        updates=(
            "my favorite color is {} now.",
            "now I like the color {} best.",
            "now the colour I like most is {}.",
        ),
        questions=(
            "what is my favorite color?",
            "what's my favourite colour?",
            "which color do I like most?",
            "what color do I like best?",
        ),
    ),
    "food": _taste("food", "eat", "eating"),
    "job": MoreWordings(
        subject="my job",
        statements=(
            "I'm a {}.",
            "I am a {}.",
            "I'm working as a {}.",
            "I earn my money as a {}.",
            "my profession is {}.",
            "my job is {}.",
        ),
        updates=("I am a {} now.", "I'm a {} now.", "I work as a {} now."),
        questions=(
            "what do I do for a living?",
            "what do I do for work?",
            "what's my profession?",
            "what is my profession?",
            "as what do I work?",
        ),
    ),
    "friend": MoreWordings(
        subject="the name of my best friend",
        statements=(
            "my best friend's name is {}.",
            "my best friend is named {}.",
            "I have a best friend, {}.",
            "my closest friend is {}.",
            "my closest friend is called {}.",
        ),
        updates=(
            "my best friend is {} now.",
            "my closest friend is {} now.",
            "I have a new best friend, {}.",
        ),
        questions=(
            "what is my best friend's name?",
            "what's my best friend's name?",
            "who's my best friend?",
            "who is my closest friend?",
        ),
    ),
    "sister": MoreWordings(
        subject="the name of my sister",
        statements=(
            "my sister's name is {}.",
            "my sister is named {}.",
            "I have a sister named {}.",
            "I have a sister, {}.",
            "I've got a sister called {}.",
            "we call my sister {}.",
        ),
        updates=("my sister is called {} now.", "we call my sister {} now."),
        questions=(
            "what is my sister's name?",
            "what's my sister's name?",
            "what's my sister called?",
            "how is my sister called?",
            "who is my sister?",
        ),
    ),
    "number": MoreWordings(
        subject="my lucky number",
        statements=(
            "my favourite number is {}.",
            "my favorite number is {}.",
            "the number I like most is {}.",
            "I am lucky with the number {}.",
            "I like the number {}.",
        ),
        updates=(
            "my favorite number is {} now.",
            "my favourite number is {} now.",
            "now I like the number {} most.",
        ),
        questions=(
            "what is my favorite number?",
            "what is my favourite number?",
            "what number brings me luck?",
            "which number do I like most?",
        ),
    ),
    "hobby": MoreWordings(
        subject="my hobby",
        statements=(
            "I enjoy {}.",
            "I like {}.",
            "I like {} in my free time.",
            "for fun I like {}.",
            "what I do for fun is {}.",
            "my favorite hobby is {}.",
        ),
        updates=("now I enjoy {}.", "my hobby is {} these days.", "now my hobby is {}."),
        questions=(
            "what do I do for fun?",
            "what do I enjoy?",
            "what do I like to do?",
            "what is my favorite hobby?",
        ),
    ),
    "drink": _taste("drink", "drink", "drinking"),
}
"""By the name of the kind of fact."""
MORE_STATEMENT_PREFIXES = ("Hi, ", "Hello, ", "Hey, ", "Hi! ", "Hello! ", "And ", "Also, ", "Yes, ")
MORE_QUESTION_PREFIXES = ("Hey, ", "Hi, ", "Please, ", "And ", "Okay, ", "Now, ")

MORE_SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hi!", "Hello! How can I help you?"),
    ("Hey there!", "Hello! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("How is it going?", "I am fine, thank you."),
    ("Thanks!", "You are welcome."),
    ("Thank you very much.", "You are welcome."),
    ("Who are you?", "I am a language model with a memory."),
    ("What are you?", "I am a language model with a memory."),
    ("What is your name?", "I am a language model with a memory."),
    ("Good evening.", "Good evening to you."),
    ("Good night.", "Good night to you."),
    ("Bye!", "I will be here."),
    ("Okay.", "Okay."),
    ("Yes.", "Okay."),
    ("No.", "Okay."),
    ("Great!", "I am glad to hear that."),
    ("That is nice.", "I am glad to hear that."),
    ("Tell me a joke.", "I do not know any jokes."),
    ("Can you help me?", "I can talk with you and remember what you tell me."),
    ("What do you remember?", "I remember what you tell me."),
)
"""What people say to a program, with nothing to remember."""
