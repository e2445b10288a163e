"""Word pools of the built-in dialogues. Plain data.

Every value is one short word, belongs to exactly one pool, and is one of many, so that a model
has to learn to copy rather than to list. Jobs begin with a consonant sound ("a baker").
"""

from __future__ import annotations

_WORDS = {
    "name": """
        Ann Ben Carl Dora Emma Fred Gina Hugo Ida Jack Kate Leo Mary Nina Oscar Paul Rita Sam Tina
        Uma Vera Will Yara Zoe Adam Beth Clara Dan Ella Finn Greta Hans Ivan Jane Karl Lisa Mark
        Nora Olga Peter Rosa Simon Tom Ursula Victor Wendy Xavier Yusuf Zara Alan Bruno Cora David
        Elena Frank Grace Helen Igor John Klara Laura Martin Nick Omar Petra Ralf Sara Theo Ulrich
        Vince Walter Yvonne Anton Boris Cecil Diana Erik Flora George Heidi Irene James Kevin Linda
        Maria Neil Otto Polly Robert Susan Thomas Vanessa Albert Betty Colin Doris Edgar Fiona
        Gustav Hilda
    """,
    "city": """
        Oslo Paris Rome Berlin Madrid London Vienna Prague Warsaw Lisbon Dublin Athens Cairo Delhi
        Tokyo Kyoto Lima Quito Miami Boston Denver Dallas Austin Chicago Toronto Ottawa Havana
        Bogota Santiago Sydney Perth Hanoi Manila Seoul Dakar Lagos Nairobi Tunis Rabat Ankara
        Beirut Baghdad Tehran Kabul Mumbai Milan Turin Naples Venice Genoa Bern Basel Zurich Geneva
        Munich Hamburg Cologne Bremen Krakow Riga Vilnius Tallinn Helsinki Bergen Malmo Porto
        Seville Valencia Lyon Brussels
    """,
    "pet": """
        Rex Bella Max Luna Rocky Milo Daisy Buddy Coco Toby Molly Rusty Sparky Lucky Shadow Ginger
        Misty Oreo Pepper Felix Tiger Smokey Simba Nala Cleo Whiskers Mittens Patch Bandit Biscuit
        Bonnie Duke Fluffy Goldie Hazel Jasper Kiwi Loki Muffin Nemo Ozzy Pixie Rolo Scout Teddy
        Waffle Ziggy Zorro Snowy Archie
    """,
    "colour": """
        red blue green black white pink brown grey purple orange yellow gold silver violet indigo
        teal cyan navy beige ivory coral maroon turquoise scarlet crimson mauve magenta lilac
        bronze copper
    """,
    "food": """
        pizza pasta rice soup bread cheese sushi curry salad tacos noodles ramen fish chicken beef
        lamb pork eggs beans lentils peas carrots tomatoes potatoes mushrooms spinach cabbage
        onions garlic corn apples pears grapes cherries bananas mangos melons plums figs dates nuts
        olives tofu stew pie cake waffles pancakes dumplings chocolate
    """,
    "job": """
        baker teacher doctor nurse pilot farmer lawyer painter writer singer dancer cook waiter
        driver sailor soldier judge tailor barber butcher carpenter plumber gardener mechanic
        scientist chemist dentist surgeon vet librarian translator reporter photographer designer
        programmer banker cashier clerk manager secretary builder miner fisherman florist jeweller
        potter guard detective coach musician
    """,
    "number": " ".join(map(str, range(10, 100))),
    "hobby": """
        chess golf tennis football yoga cycling running swimming hiking fishing sailing skiing
        surfing climbing dancing singing painting drawing reading writing cooking baking gardening
        knitting sewing pottery photography poker bowling boxing judo karate rowing skating archery
        camping origami astronomy juggling badminton
    """,
    "drink": """
        coffee tea water milk juice lemonade cola wine beer cider cocoa rum gin vodka whisky brandy
        champagne tonic soda sherry mead sake espresso latte kefir ginseng squash punch eggnog
        buttermilk
    """,
}

POOLS: dict[str, tuple[str, ...]] = {pool: tuple(words.split()) for pool, words in _WORDS.items()}
"""Pool name -> values. ``name`` serves three kinds of fact, ``pet`` two."""
