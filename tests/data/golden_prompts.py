"""First rows of MMEB's tasks as its users quote them, some shortened: their parts, and what they make."""

from __future__ import annotations

CLASSIFY = "Represent the given image for classification"
ASK = "Represent the given image with the following question:"
SHOW = "<|image_1|>\nRepresent the given image.\n"
CROP = "<|image_1|>\nRepresent the given cropped image of the object"
WIKI = "Represent the given Wikipedia image with related text information:"
HATE = (
    "Represent the given image for binary classification to determine whether it constitutes hateful speech"
)
NEWS = "Represent the given news image with the following caption for domain classification:"

# task: query instruction, query text, what both make; the same of a candidate.
GOLDEN: dict[str, tuple[str, str, str, str, str, str]] = {
    "ImageNet-1K": (CLASSIFY, "", f"<|image_1|>\n{CLASSIFY}\n", "", "coucal", "coucal"),
    "N24News": (NEWS, "Anthony Pidgeon", f"<|image_1|>\n{NEWS} Anthony Pidgeon\n", "", "Travel", "Travel"),
    "HatefulMemes": (HATE, "", f"<|image_1|>\n{HATE}\n", "", "Yes", "Yes"),
    "VOC2007": (
        "Identify the object shown in the image",
        "",
        "<|image_1|>\nIdentify the object shown in the image\n",
        "",
        "chair",
        "chair",
    ),
    "SUN397": (
        "Identify the scene shown in the image",
        "",
        "<|image_1|>\nIdentify the scene shown in the image\n",
        "",
        "firing range indoor",
        "firing range indoor",
    ),
    "Place365": (
        "Identify the scene shown in the image",
        "",
        "<|image_1|>\nIdentify the scene shown in the image\n",
        "",
        "berth",
        "berth",
    ),
    "ImageNet-A": (CLASSIFY, "", f"<|image_1|>\n{CLASSIFY}\n", "", "Rottweiler", "Rottweiler"),
    "ImageNet-R": (CLASSIFY, "", f"<|image_1|>\n{CLASSIFY}\n", "", "flute", "flute"),
    "ObjectNet": (
        "Identify the object shown in the image",
        "",
        "<|image_1|>\nIdentify the object shown in the image\n",
        "",
        "tray",
        "tray",
    ),
    "Country211": (
        "Identify the country depicted in the image",
        "",
        "<|image_1|>\nIdentify the country depicted in the image\n",
        "",
        "Fiji",
        "Fiji",
    ),
    **{
        name: (ASK, question, f"<|image_1|>\n{ASK} {question}\n", "", answer, answer)
        for name, question, answer in (
            ("OK-VQA", "What sport can you use this for?", "race"),
            ("A-OKVQA", "What is in the motorcyclist's mouth?", "cigarette"),
            ("DocVQA", "What is the ‘actual’ value per 1000, during the year 1975?", "0.28"),
            ("InfographicsVQA", "Which social platform has heavy female audience?", "pinterest"),
            ("ChartQA", "How many food item is shown in the bar graph?", "14"),
            ("Visual7W", "What color is the sidewalk?", "Gray."),
            ("ScienceQA", "Which of the following could Gordon's test show?", "how steady a parachute was"),
            ("VizWiz", "Can you tell me what this medicine is please?", "night time"),
            ("GQA", "What is this bird called?", "This is a parrot."),
            ("TextVQA", "what is the brand of this camera?", "dakota"),
        )
    },
    "VisDial": (
        "Represent the given dialogue about an image, which is used for image retrieval:",
        "Q:is the photo in color\nA:yes\nQ:is it well lit\nA:no",
        "Represent the given dialogue about an image, which is used for image retrieval: "
        "Q:is the photo in color\nA:yes\nQ:is it well lit\nA:no\n\n",
        "Represent the given image",
        "",
        "<|image_1|>\nRepresent the given image\n",
    ),
    "CIRR": (
        "Given an image, find a similar everyday image with the described changes:",
        "Show three bottles of soft drink.",
        "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: "
        "Show three bottles of soft drink.\n",
        "Represent the given image.\n",
        "",
        SHOW,
    ),
    "VisualNews_t2i": (
        "Retrieve an image of this news caption.",
        "Rahul Gandhi in New Delhi on April 4 2013.",
        "Retrieve an image of this news caption. Rahul Gandhi in New Delhi on April 4 2013.\n",
        "Represent the given image.",
        "",
        SHOW,
    ),
    "VisualNews_i2t": (
        "Find a caption for the news in the given photo.",
        "",
        "<|image_1|>\nFind a caption for the news in the given photo.\n",
        "",
        "Rahul Gandhi in New Delhi on April 4 2013.",
        "Rahul Gandhi in New Delhi on April 4 2013.",
    ),
    "MSCOCO_t2i": (
        "Find me an everyday image that matches the given caption:",
        "A man with a red helmet on a small moped on a dirt road.",
        "Find me an everyday image that matches the given caption: "
        "A man with a red helmet on a small moped on a dirt road.\n",
        "Represent the given image.",
        "",
        SHOW,
    ),
    "MSCOCO_i2t": (
        "Find an image caption describing the given everyday image.",
        "",
        "<|image_1|>\nFind an image caption describing the given everyday image.\n",
        "",
        "A man with a red helmet on a small moped on a dirt road.",
        "A man with a red helmet on a small moped on a dirt road.",
    ),
    "NIGHTS": (
        "Find a day-to-day image that looks similar to the provided image.",
        "",
        "<|image_1|>\nFind a day-to-day image that looks similar to the provided image.\n",
        "Represent the given image.\n",
        "",
        SHOW,
    ),
    "WebQA": (
        "Find a Wikipedia image that answers this question:",
        "Does a Minnetonka Rhododendron flower have petals in a cup shape?",
        "Find a Wikipedia image that answers this question: "
        "Does a Minnetonka Rhododendron flower have petals in a cup shape?\n",
        WIKI,
        "Minnetonka Rhododendron flower along Tranquility Court.",
        f"<|image_1|>\n{WIKI} Minnetonka Rhododendron flower along Tranquility Court.\n",
    ),
    "FashionIQ": (
        "Find an image to match the fashion image and style note:",
        "Is shiny and silver with shorter sleeves and fit and flare.",
        "<|image_1|>\nFind an image to match the fashion image and style note: "
        "Is shiny and silver with shorter sleeves and fit and flare.\n",
        "Represent the given image.\n",
        "",
        SHOW,
    ),
    "Wiki-SS-NQ": (
        "Find the document image that can answer the given query:",
        "who needs to know about the jet stream",
        "Find the document image that can answer the given query: who needs to know about the jet stream\n",
        "Represent the given image",
        "",
        "<|image_1|>\nRepresent the given image\n",
    ),
    "OVEN": (
        "Retrieve a Wikipedia image-description pair that provides evidence for the question of this image:",
        "What is the name of this place?",
        "<|image_1|>\nRetrieve a Wikipedia image-description pair that provides evidence for the question of "
        "this image: What is the name of this place?\n",
        WIKI,
        "Titisee. The Titisee is a lake in the southern Black Forest.",
        f"<|image_1|>\n{WIKI} Titisee. The Titisee is a lake in the southern Black Forest.\n",
    ),
    "EDIS": (
        "Find a news image that matches the provided caption:",
        "Shimon Peres right and Mahmoud Abbas arrive.",
        "Find a news image that matches the provided caption: Shimon Peres right and Mahmoud Abbas arrive.\n",
        "Represent the given image with related text information:",
        "As the West pays tribute.",
        "<|image_1|>\nRepresent the given image with related text information: As the West pays tribute.\n",
    ),
    "MSCOCO": (
        "Crop the image to to isolate the object labeled as",
        '"dog"',
        '<|image_1|>\nCrop the image to to isolate the object labeled as "dog"\n',
        "Represent the given cropped image of the object",
        "",
        CROP,
    ),
    "RefCOCO": (
        "Select the portion of the image that follows the language expressions.",
        '"bowl behind the others can only see part"',
        "<|image_1|>\nSelect the portion of the image that follows the language expressions. "
        '"bowl behind the others can only see part"\n',
        "Represent the given cropped image of the object",
        "",
        CROP,
    ),
    "RefCOCO-Matching": (
        "Select the portion of the image that follows the language expressions:",
        '"bowl behind the others can only see part"',
        "<|image_1|>\nSelect the portion of the image that follows the language expressions: "
        '"bowl behind the others can only see part"\n',
        "Select the portion of the image that follows the language expressions:",
        '"Dish in top right corner"',
        "<|image_1|>\nSelect the portion of the image that follows the language expressions: "
        '"Dish in top right corner"\n',
    ),
    "Visual7W-Pointing": (
        "Select the portion of the image that answers the question",
        '"Which box frames the toilet?"',
        "<|image_1|>\nSelect the portion of the image that answers the question "
        '"Which box frames the toilet?"\n',
        "Represent the given cropped image of the object",
        "",
        CROP,
    ),
}
