"""What the built-in dialogues talk about: twelve kinds of fact and how they are told. Plain data.

Not here: how a dialogue is put together (``generator``). ``{}`` stands for the value. A value
never begins a sentence, so a sub-word tokenizer meets each value in one spelling only. Sentences
begin in lower case because a prefix may precede them; the generator capitalises.
"""

from __future__ import annotations

from dataclasses import dataclass

from rxlm.data.fact_values import POOLS


@dataclass(frozen=True)
class FactKind:
    """One kind of fact: its values and every way to tell it, change it and ask for it."""

    name: str
    pool: str
    """Key of :data:`~rxlm.data.fact_values.POOLS`; kinds may share a pool."""
    clause: str
    """Short form, for two facts in one sentence."""
    statements: tuple[str, ...]
    """The last one is held out of training."""
    updates: tuple[str, ...]
    questions: tuple[str, ...]
    """The last one is held out of training."""
    answer: str
    """The one right answer, word for word."""
    unknown: str
    """The one right answer when the fact was never told."""
    echo: str
    """Acknowledgement that repeats the fact."""

    @property
    def values(self) -> tuple[str, ...]:
        """All values that this fact can have."""
        return POOLS[self.pool]


FACT_KINDS: tuple[FactKind, ...] = (
    FactKind(
        name="name",
        pool="name",
        clause="my name is {}",
        statements=(
            "my name is {}.",
            "I am {}.",
            "people call me {}.",
            "you can call me {}.",
            "I am called {}.",
            "I go by the name {}.",
        ),
        updates=(
            "actually, my name is {}.",
            "please call me {} from now on.",
            "I changed my name to {}.",
        ),
        questions=(
            "what is my name?",
            "do you remember my name?",
            "who am I?",
            "what name do I go by?",
        ),
        answer="Your name is {}.",
        unknown="I do not know your name yet.",
        echo="Nice to meet you, {}.",
    ),
    FactKind(
        name="city",
        pool="city",
        clause="I live in {}",
        statements=(
            "I live in {}.",
            "my home is in {}.",
            "I have a flat in {}.",
            "the city I live in is {}.",
            "I spend my days in {}.",
            "my flat is in {}.",
        ),
        updates=(
            "actually, I moved to {}.",
            "I live in {} now.",
            "my new home is in {}.",
        ),
        questions=(
            "where do I live?",
            "what city do I live in?",
            "do you remember where I live?",
            "where is my home?",
        ),
        answer="You live in {}.",
        unknown="I do not know where you live yet.",
        echo="You live in {}, noted.",
    ),
    FactKind(
        name="dog",
        pool="pet",
        clause="my dog is called {}",
        statements=(
            "my dog is called {}.",
            "I have a dog called {}.",
            "the name of my dog is {}.",
            "I call my dog {}.",
            "I go out with my dog {} every day.",
            "my dog has the name {}.",
        ),
        updates=(
            "actually, my dog is called {}.",
            "my new dog is called {}.",
            "I changed the name of my dog to {}.",
        ),
        questions=(
            "what is my dog called?",
            "what is the name of my dog?",
            "do you remember the name of my dog?",
            "which name has my dog?",
        ),
        answer="Your dog is called {}.",
        unknown="I do not know the name of your dog yet.",
        echo="Your dog is called {}, noted.",
    ),
    FactKind(
        name="cat",
        pool="pet",
        clause="my cat is called {}",
        statements=(
            "my cat is called {}.",
            "I have a cat called {}.",
            "the name of my cat is {}.",
            "I call my cat {}.",
            "I play with my cat {} every day.",
            "my cat has the name {}.",
        ),
        updates=(
            "actually, my cat is called {}.",
            "my new cat is called {}.",
            "I changed the name of my cat to {}.",
        ),
        questions=(
            "what is my cat called?",
            "what is the name of my cat?",
            "do you remember the name of my cat?",
            "which name has my cat?",
        ),
        answer="Your cat is called {}.",
        unknown="I do not know the name of your cat yet.",
        echo="Your cat is called {}, noted.",
    ),
    FactKind(
        name="colour",
        pool="colour",
        clause="my favourite colour is {}",
        statements=(
            "my favourite colour is {}.",
            "I like the colour {} most.",
            "the colour I like most is {}.",
            "no colour is better than {}.",
            "the colour I love is {}.",
            "I love the colour {}.",
        ),
        updates=(
            "actually, my favourite colour is {}.",
            "my new favourite colour is {}.",
            "now I like the colour {} most.",
        ),
        questions=(
            "what is my favourite colour?",
            "which colour do I like most?",
            "do you remember my favourite colour?",
            "what colour do I love?",
        ),
        answer="Your favourite colour is {}.",
        unknown="I do not know your favourite colour yet.",
        echo="Your favourite colour is {}, noted.",
    ),
    FactKind(
        name="food",
        pool="food",
        clause="my favourite food is {}",
        statements=(
            "my favourite food is {}.",
            "I like to eat {} most.",
            "the food I like most is {}.",
            "no food is better than {}.",
            "I could eat {} every day.",
            "I love to eat {}.",
        ),
        updates=(
            "actually, my favourite food is {}.",
            "my new favourite food is {}.",
            "now I like to eat {} most.",
        ),
        questions=(
            "what is my favourite food?",
            "which food do I like most?",
            "do you remember my favourite food?",
            "what do I like to eat most?",
        ),
        answer="Your favourite food is {}.",
        unknown="I do not know your favourite food yet.",
        echo="Your favourite food is {}, noted.",
    ),
    FactKind(
        name="job",
        pool="job",
        clause="I work as a {}",
        statements=(
            "I work as a {}.",
            "my job is to be a {}.",
            "I am a {} by trade.",
            "I have a job as a {}.",
            "I have worked as a {} for years.",
            "my work is to be a {}.",
        ),
        updates=(
            "actually, I work as a {} now.",
            "I have a new job as a {}.",
            "I changed my job, now I am a {}.",
        ),
        questions=(
            "what is my job?",
            "what do I work as?",
            "do you remember my job?",
            "which job do I have?",
        ),
        answer="You work as a {}.",
        unknown="I do not know your job yet.",
        echo="You work as a {}, noted.",
    ),
    FactKind(
        name="friend",
        pool="name",
        clause="my best friend is {}",
        statements=(
            "my best friend is {}.",
            "my best friend is called {}.",
            "the name of my best friend is {}.",
            "I have a best friend called {}.",
            "no friend is better than {}.",
            "I call {} my best friend.",
        ),
        updates=(
            "actually, my best friend is {}.",
            "my new best friend is {}.",
            "now {} is my best friend.",
        ),
        questions=(
            "who is my best friend?",
            "what is the name of my best friend?",
            "do you remember my best friend?",
            "what is my best friend called?",
        ),
        answer="Your best friend is {}.",
        unknown="I do not know your best friend yet.",
        echo="Your best friend is {}, noted.",
    ),
    FactKind(
        name="sister",
        pool="name",
        clause="my sister is called {}",
        statements=(
            "my sister is called {}.",
            "I have a sister called {}.",
            "the name of my sister is {}.",
            "I spend my days with my sister {}.",
            "my sister goes by {}.",
            "my sister has the name {}.",
        ),
        updates=(
            "actually, my sister is called {}.",
            "my sister changed her name to {}.",
            "my sister goes by {} now.",
        ),
        questions=(
            "what is my sister called?",
            "what is the name of my sister?",
            "do you remember the name of my sister?",
            "which name has my sister?",
        ),
        answer="Your sister is called {}.",
        unknown="I do not know the name of your sister yet.",
        echo="Your sister is called {}, noted.",
    ),
    FactKind(
        name="number",
        pool="number",
        clause="my lucky number is {}",
        statements=(
            "my lucky number is {}.",
            "the number {} brings me luck.",
            "I always pick the number {}.",
            "no number is better than {}.",
            "the number that brings me luck is {}.",
            "the number I always pick is {}.",
        ),
        updates=(
            "actually, my lucky number is {}.",
            "my new lucky number is {}.",
            "now the number {} brings me luck.",
        ),
        questions=(
            "what is my lucky number?",
            "which number brings me luck?",
            "do you remember my lucky number?",
            "which number do I always pick?",
        ),
        answer="Your lucky number is {}.",
        unknown="I do not know your lucky number yet.",
        echo="Your lucky number is {}, noted.",
    ),
    FactKind(
        name="hobby",
        pool="hobby",
        clause="my hobby is {}",
        statements=(
            "my hobby is {}.",
            "in my free time I like {}.",
            "I spend my free time on {}.",
            "the hobby I like most is {}.",
            "I always have time for {}.",
            "I like {} as a hobby.",
        ),
        updates=(
            "actually, my hobby is {}.",
            "my new hobby is {}.",
            "I changed my hobby to {}.",
        ),
        questions=(
            "what is my hobby?",
            "what do I do in my free time?",
            "do you remember my hobby?",
            "which hobby do I have?",
        ),
        answer="Your hobby is {}.",
        unknown="I do not know your hobby yet.",
        echo="Your hobby is {}, noted.",
    ),
    FactKind(
        name="drink",
        pool="drink",
        clause="my favourite drink is {}",
        statements=(
            "my favourite drink is {}.",
            "I like to drink {} most.",
            "the drink I like most is {}.",
            "no drink is better than {}.",
            "I could drink {} every day.",
            "I love to drink {}.",
        ),
        updates=(
            "actually, my favourite drink is {}.",
            "my new favourite drink is {}.",
            "now I like to drink {} most.",
        ),
        questions=(
            "what is my favourite drink?",
            "which drink do I like most?",
            "do you remember my favourite drink?",
            "what do I like to drink most?",
        ),
        answer="Your favourite drink is {}.",
        unknown="I do not know your favourite drink yet.",
        echo="Your favourite drink is {}, noted.",
    ),
)

KINDS_BY_NAME: dict[str, FactKind] = {kind.name: kind for kind in FACT_KINDS}

STATEMENT_PREFIXES = (
    "By the way, ",
    "Just so you know, ",
    "Oh, ",
    "Well, ",
    "You know, ",
    "So, ",
)

QUESTION_PREFIXES = ("Tell me, ", "So, ", "By the way, ")

ACKNOWLEDGEMENTS = (
    "Okay, I will remember that.",
    "Thank you for telling me.",
    "Good to know.",
    "I see.",
    "Got it.",
    "I will keep that in mind.",
)

SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! How can I help you?"),
    ("How are you today?", "I am fine, thank you."),
    ("What can you do?", "I can talk with you and remember what you tell me."),
    ("Good morning.", "Good morning to you."),
    ("Thank you.", "You are welcome."),
    ("It is raining today.", "Then take an umbrella with you."),
    ("I am tired.", "You should get some rest."),
    ("The sun is shining.", "That sounds like a lovely day."),
    ("What is two plus two?", "Two plus two is four."),
    ("Are you a robot?", "I am a language model with a memory."),
    ("I had a busy day.", "I hope you can rest now."),
    ("Let us talk about the news.", "I do not read the news."),
    ("I watched a film last night.", "I hope you liked the film."),
    ("What day comes after Monday?", "Tuesday comes after Monday."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("I am waiting for the bus.", "I hope the bus comes soon."),
    ("Do you like books?", "I like to hear about books."),
    ("The train was late again.", "That must be annoying."),
    ("I need to go to the shop.", "You should make a list."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("See you later.", "I will be here."),
)
"""Turns with nothing to remember."""

DISTRACTORS: tuple[tuple[str, str, str], ...] = (
    ("name", "My neighbour is called {}.", "That is good to know about your neighbour."),
    ("city", "My neighbour lives in {}.", "That is good to know about your neighbour."),
    ("food", "My neighbour likes {}.", "That is good to know about your neighbour."),
    ("job", "My neighbour works as a {}.", "That is good to know about your neighbour."),
    ("pet", "My neighbour has a parrot called {}.", "That is good to know about your neighbour."),
    ("colour", "My neighbour painted the door {}.", "I hope your neighbour likes it."),
    ("number", "My neighbour lives at number {}.", "I hope your neighbour likes it."),
    ("hobby", "My neighbour talks about {}.", "I hope your neighbour likes it."),
    ("drink", "My neighbour drinks {}.", "I hope your neighbour likes it."),
    ("name", "Do you know anyone called {}?", "No, I know no one called {}."),
    ("city", "Have you heard of {}?", "Yes, I have heard of {}."),
    ("pet", "Is {} a good name for a horse?", "I think {} is a good name."),
    ("colour", "Is {} a good colour for a car?", "I think {} is a good colour."),
    ("food", "What do you think of {}?", "Many people like {}."),
    ("job", "Is it hard to be a {}?", "You can learn to be a {}."),
    ("number", "Is {} a big number?", "I think {} is just a number."),
    ("hobby", "Is {} fun?", "Many people like {}."),
    ("drink", "Do you sell {}?", "No, I do not sell {}."),
)
"""(pool, query, answer) that mention values without telling a fact about the user.

Half of the answers repeat the value: so every word of a pool occurs in answers of the training
split, those of held-out (kind, value) pairs too.
"""
