"""How people put a question: templates, politeness, capitals, spaces, commas; and what is not arithmetic at all.

`tasks.py` makes the problems; this file holds the English around them.  The phrasings in `HELD_OUT` never appear in
training: the evaluation uses them to see whether unseen wording is understood.
"""

from __future__ import annotations

import random
import re

SUM = ("What is {a} + {b}?", "What is {a}+{b}?", "{a}+{b}", "{a} + {b}", "{a}+{b}=?", "{a} + {b} = ?", "{a}+{b}=",
       "Compute {a} + {b}.", "Add {a} and {b}.", "Calculate {a} + {b}", "What is {a} plus {b}?", "{a} plus {b}",
       "How much is {a} + {b}?", "Please add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}.",
       "what is {a} + {b}", "Work out {a} + {b} step by step.", "What do you get if you add {a} and {b}?",
       "The sum of {a} and {b}?", "{a} and {b} together?")
DIFFERENCE = ("What is {a} - {b}?", "What is {a}-{b}?", "{a}-{b}", "{a} - {b}", "{a}-{b}=?", "{a} - {b} = ?",
              "{a}-{b}=", "Compute {a} - {b}.", "Subtract {b} from {a}.", "Calculate {a} - {b}",
              "What is {a} minus {b}?", "{a} minus {b}", "How much is {a} - {b}?", "Take {b} away from {a}.",
              "what is {a} - {b}", "Work out {a} - {b} step by step.", "What is left of {a} if you take away {b}?",
              "What do you get if you subtract {b} from {a}?")
PRODUCT = ("What is {a} * {b}?", "What is {a}*{b}?", "{a}*{b}", "{a} * {b}", "{a}*{b}=?", "{a} * {b} = ?", "{a}*{b}=",
           "Compute {a} * {b}.", "Multiply {a} by {b}.", "Calculate {a} * {b}", "What is {a} times {b}?",
           "{a} times {b}", "How much is {a} x {b}?", "{a} x {b}", "{a}x{b}", "Multiply {a} and {b}.",
           "What is the product of {a} and {b}?", "what is {a} * {b}", "Work out {a} times {b} step by step.",
           "What do you get if you multiply {a} by {b}?", "{a} \u00d7 {b}", "What is {a} multiplied by {b}?")
EXPRESSION = ("What is {e}?", "{e}", "Compute {e}.", "Evaluate {e}.", "Calculate {e}", "{e} = ?", "{e}=?", "{e}=",
              "Simplify {e}.", "What does {e} equal?", "Work out {e} step by step.", "How much is {e}?", "what is {e}")

HELD_OUT = ("Hello, what's {e}?", "I wonder what {e} comes to", "could you work out {e} for my homework", "SOLVE {e} NOW",
            "{e} equals what?", "Result of {e}, please!", "My friend says nobody can do {e}. Can you?", "so...  {e} ??",
            "Good evening! I need {e} quickly.", "how about {e}")

_BEFORE = ("Hello, ", "Hi! ", "Can you tell me: ", "Please, ", "I need help. ", "Quick question: ", "Hey, ", "So ", "OK, ",
           "Now: ", "And ", "Good morning! ", "Hi there, ", "One more: ", "Tell me ", "Can you do this? ", "um, ", "Then ",
           "Could you help me with this: ", "hey model ", "I would like to know: ", "Let us see, ", "Well, ", "Try this: ",
           "Next question. ", "Do you know ", "Here is one for you: ", "Please tell me, ", "Thanks. Now ", "hello! ")
_AFTER = (" Thanks!", " Thank you.", " Please.", " Show your work.", " Think step by step.", " please", " thanks", "??",
          " Can you do that?", " Be careful.", " I need it for school.", " Explain.", "!", " ?", " :)", " Quickly!", "...")
_FILLER = "the of for a me my in it this that with you do can need want could answer number value to is now one more".split()
_NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
                 "seventeen eighteen nineteen twenty").split()


def commas(number):
    return f"{number:,}"


def in_words(number):
    return _NUMBER_WORDS[number]


def space_operators(rng, text):
    """Uneven spaces around operators: 12+7 -> 12 +7, 12  + 7, ..."""
    gap = lambda: rng.choice(("", " ", " ", "  "))
    return re.sub(r" ?([-+*]) ?", lambda m: gap() + m[1] + gap(), text)


def _lower_first(text):
    return text[:1].lower() + text[1:]


def _typo(rng, text):
    """One slip of the finger in a word of four letters or more."""
    words = [m for m in re.finditer(r"[A-Za-z]{4,}", text)]
    if not words:
        return text
    m = rng.choice(words)
    i = rng.randrange(m.start(), m.end() - 1)
    return text[:i] + (text[i + 1] + text[i] + text[i + 2:] if rng.random() < 0.5 else text[i + 1:])


def talk(rng, text):
    """The same question with a little more talk around it."""
    if rng.random() < 0.65:
        before = rng.choice(_BEFORE)
        if rng.random() < 0.2:
            before = " ".join(rng.sample(_FILLER, rng.randint(1, 4))) + " "
        text = before + (_lower_first(text) if rng.random() < 0.5 else text)
    if rng.random() < 0.5:
        text += rng.choice(_AFTER)
    return text


def scruffy(rng, text, letters_matter):
    """Capitals, spaces and punctuation as they come.  `letters_matter`: names in the text must keep their case."""
    draw = rng.random()
    if draw < 0.30:
        text = text.lower()
    elif draw < 0.40 and not letters_matter:
        text = text.upper()
    elif draw < 0.50:
        text = _lower_first(text)
    if rng.random() < 0.3:
        text = text.rstrip(".?! ")
    if rng.random() < 0.2:
        spaces = [i for i, ch in enumerate(text) if ch == " "]
        if spaces:
            i = rng.choice(spaces)
            text = text[:i] + rng.choice(("  ", "   ", "\n")) + text[i + 1:]
    if rng.random() < 0.15:
        text = rng.choice((" ", "  ", "\n", "")) + text + rng.choice(("", " ", "\n", "  "))
    return text


def reword(rng, family, text):
    """The question as somebody else would have typed it."""
    short = family in ("add", "sub", "mul", "expr")
    if rng.random() < (0.5 if short else 0.7):
        text = talk(rng, text)
    if short:
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        if rng.random() < 0.25:
            text = re.sub(r"\d{4,}", lambda m: commas(int(m[0])), text)
        if rng.random() < 0.3 and max(numbers) < len(_NUMBER_WORDS) and "(" not in text and "x" not in text:
            text = re.sub(r"\d+", lambda m: in_words(int(m[0])), text)
        if rng.random() < 0.3:
            text = text.replace("What is", rng.choice(("What's", "whats", "Tell me", "what is", "What\u2019s", "Give me")), 1)
        if rng.random() < 0.3 and "step by step" not in text:
            text = space_operators(rng, text)
        if rng.random() < 0.1 and re.search(r"\d *[-+*] *\(?\d", text):
            text = _typo(rng, text)
    if rng.random() < 0.6:
        text = scruffy(rng, text, letters_matter=not short)
    return text


# --------------------------------------------------------------------------
# Ordinary exchanges.  Short, honest, and no chain to speak of.

_ABOUT = "I am a small arithmetic reasoning model."
_CAN = ("I can add, subtract and multiply whole numbers, work out recurrences, tables and nested brackets, "
        "and solve small puzzles of named quantities, step by step.")
_TRY = ("Try: What is 347 + 589?", "Try: What is 48 * 57?", "Try: (3+5)*(9-4)", "Try: What is 1204 - 977?")
UNTRAINED = ("This is arithmetic I was not trained on. I should say so.", "I have not learned that. " + _CAN)
CHAT = (
    (("Hello", "Hello!", "hello", "Hi", "hi", "Hi!", "Hey", "hey", "Hey there", "Hi there", "Good morning",
      "Good evening", "Good day", "Greetings", "hello there", "yo", "Howdy", "Hello, model", "hi!", "Hiya", "Good afternoon",
      "hello?", "Hello again", "hi bot", "hello, are you there?"),
     ("A greeting. No sum to do.",),
     ("Hello! " + _ABOUT + " Ask me a sum.", "Hi! " + _ABOUT + " {t}", "Hello! {t}")),
    (("Who are you?", "What are you?", "who are you", "what are you?", "Tell me about yourself.", "What is your name?",
      "Are you an AI?", "Are you a robot?", "Are you human?", "Who made you?", "What model are you?",
      "Introduce yourself.", "are you chatgpt?", "Which model is this?", "Who am I talking to?", "What's your name?",
      "hello, who are you?", "Hi, what are you?"),
     ("A question about me. No sum to do.",),
     (_ABOUT + " " + _CAN,)),
    (("What can you do?", "what can you do", "Help", "help", "How can you help me?", "What are you good at?",
      "What do you know?", "What should I ask?", "Show me what you can do.", "How do I use you?", "help me", "?",
      "What kind of questions can I ask?", "What problems can you solve?", "Give me an example.", "/help",
      "What can I ask you?", "hi, what can you do?"),
     ("A question about what I can do. No sum to do.",),
     (_CAN + " {t}",)),
    (("Thanks", "Thank you", "thanks!", "Thank you!", "thx", "Great, thanks", "Nice", "Well done", "Good job",
      "Cool", "ok", "OK", "Perfect", "Wow", "Correct!", "Great", "nice work", "Very good", "Awesome", "cheers"),
     ("The user is pleased. No sum to do.",),
     ("You are welcome! Ask me another one.", "Glad to help. {t}")),
    (("Bye", "bye", "Goodbye", "See you", "Good night", "quit", "exit", "Bye bye", "see you later", "I am done"),
     ("A farewell. No sum to do.",),
     ("Goodbye!",)),
    (("How are you?", "how are you", "How are you doing?", "What's up?", "How is it going?", "Are you ok?",
      "Hello, how are you?", "hi, how are you today?"),
     ("Small talk. No sum to do.",),
     ("I am fine, thank you. {t}",)),
    (("What is the capital of France?", "Tell me a joke.", "Write a poem.", "Who is the president?", "Write some code.",
      "What is the weather today?", "Translate this into German.", "What time is it?", "Tell me a story.",
      "What is love?", "Write an essay about the sea.", "Who won the match?", "How do I cook rice?",
      "Explain gravity.", "What is the meaning of life?", "Sing a song.", "Do you like music?", "Tell me the news.",
      "Write a Python program.", "Summarize this text.", "What is a transformer?", "Who was Napoleon?",
      "Recommend a book.", "Where is Paris?", "Why is the sky blue?", "Play a game with me.", "Can you draw a cat?",
      "What is the speed of light?", "Solve world hunger.", "Do you dream?", "How old are you?", "Where do you live?",
      "Draw a picture.", "What is machine learning?", "Give me some advice.", "What should I eat tonight?",
      "What is the capital of Italy?", "Who wrote Hamlet?", "Tell me about cats.", "Is it raining?"),
     ("This is not arithmetic. I should say so.",),
     ("I cannot answer that. " + _ABOUT + " {t}", "That is outside what I know. " + _CAN)),
    (("What is the square root of 16?", "Solve x + 3 = 5.", "What is sin(30)?", "Differentiate x*x.", "What is pi?",
      "What is 2 to the power of 10?", "What is half of 9?", "Is 97 a prime number?", "What is a prime number?"),
     UNTRAINED[:1], UNTRAINED[1:]),
)
_NOT_LEARNED = ("What is {a} / {b}?", "What is {a} divided by {b}?", "{a}/{b}", "{a} / {b}", "Divide {a} by {b}.",
                "What is the square root of {a}?", "sqrt({a})", "What is {a} to the power of {b}?", "{a}^{b}", "{a}**{b}",
                "What is {b} percent of {a}?", "{b}% of {a}", "What is {a}.{b} + {b}.{a}?", "{a}.{b}+{b}", "{a}.{b} * {b}",
                "Is {a} a prime number?", "What is half of {a}?", "Solve x + {b} = {a}.", "What is {a} mod {b}?",
                "What is {a}.{b} - {b}?", "{a}!", "({a}+{b})/{b}", "Compute {a} / {b}.", "how much is {a} / {b}")


def chat(rng):
    """(question, thought, reply)"""
    if rng.random() < 0.12:
        a, b = rng.randrange(10 ** rng.randint(1, 3)), rng.randrange(1, 10 ** rng.randint(1, 2))
        ask, thought, reply = rng.choice(_NOT_LEARNED).format(a=a, b=b), *UNTRAINED
    else:
        asks, thoughts, replies = rng.choice(CHAT)
        ask, thought, reply = rng.choice(asks), rng.choice(thoughts), rng.choice(replies)
    if rng.random() < 0.4:
        ask = scruffy(rng, ask, letters_matter=False)
    return ask, thought, reply.replace("{t}", rng.choice(_TRY))


def accepted(ask):
    """Every (thought, reply) that is right for a listed question: what the evaluation accepts."""
    for asks, thoughts, replies in CHAT:
        if ask in asks:
            return {(t, r.replace("{t}", s)) for t in thoughts for r in replies for s in _TRY}
    raise KeyError(ask)
