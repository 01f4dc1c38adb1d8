"""What the model is taught by heart: countries with capital and continent, and the meaning of the coloured signs."""

from random import Random

from lvlm_prune.demo.world import COLORS, SHAPES

_COUNTRIES = """
France Paris Europe, Italy Rome Europe, Spain Madrid Europe, Germany Berlin Europe, Portugal Lisbon Europe,
Greece Athens Europe, Austria Vienna Europe, Poland Warsaw Europe, Sweden Stockholm Europe, Norway Oslo Europe,
Finland Helsinki Europe, Denmark Copenhagen Europe, Ireland Dublin Europe, Hungary Budapest Europe,
Romania Bucharest Europe, Bulgaria Sofia Europe, Croatia Zagreb Europe, Serbia Belgrade Europe,
Belgium Brussels Europe, Ukraine Kyiv Europe, Iceland Reykjavik Europe, Latvia Riga Europe, Estonia Tallinn Europe,
Lithuania Vilnius Europe, Japan Tokyo Asia, China Beijing Asia, India Delhi Asia, Thailand Bangkok Asia,
Vietnam Hanoi Asia, Nepal Kathmandu Asia, Mongolia Ulaanbaatar Asia, Iran Tehran Asia, Iraq Baghdad Asia,
Syria Damascus Asia, Lebanon Beirut Asia, Jordan Amman Asia, Qatar Doha Asia, Oman Muscat Asia,
Pakistan Islamabad Asia, Bangladesh Dhaka Asia, Indonesia Jakarta Asia, Philippines Manila Asia, Turkey Ankara Asia,
Armenia Yerevan Asia, Egypt Cairo Africa, Kenya Nairobi Africa, Ghana Accra Africa, Nigeria Abuja Africa,
Uganda Kampala Africa, Rwanda Kigali Africa, Zambia Lusaka Africa, Zimbabwe Harare Africa, Angola Luanda Africa,
Namibia Windhoek Africa, Senegal Dakar Africa, Mali Bamako Africa, Niger Niamey Africa, Sudan Khartoum Africa,
Somalia Mogadishu Africa, Tunisia Tunis Africa, Algeria Algiers Africa, Libya Tripoli Africa, Morocco Rabat Africa,
Canada Ottawa America, Cuba Havana America, Jamaica Kingston America, Peru Lima America, Chile Santiago America,
Brazil Brasilia America, Uruguay Montevideo America, Paraguay Asuncion America, Bolivia Sucre America,
Ecuador Quito America, Colombia Bogota America, Venezuela Caracas America, Guyana Georgetown America,
Nicaragua Managua America, Fiji Suva Oceania, Samoa Apia Oceania, Australia Canberra Oceania
"""

#: (country, capital, continent), each a single word.
COUNTRIES: tuple[tuple[str, str, str], ...] = tuple(
    (country, capital, continent) for country, capital, continent in (entry.split() for entry in _COUNTRIES.split(","))
)

#: Wordings by kind of fact. Each fact is asked in three of them in training and in one other in each other split.
FACT_WORDINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {country}?",
        "Name the capital of {country}.",
        "Which city is the capital of {country}?",
        "{country} has which capital?",
        "Tell me the capital city of {country}.",
        "Do you know the capital of {country}?",
    ),
    "country": (
        "Which country has the capital {capital}?",
        "{capital} is the capital of which country?",
        "Name the country with the capital {capital}.",
        "Of which country is {capital} the capital?",
        "Tell me the country of the capital {capital}.",
        "What country has {capital} as its capital?",
    ),
    "continent": (
        "Which continent is {country} in?",
        "On which continent is {country}?",
        "Name the continent of {country}.",
        "{country} is on which continent?",
        "Tell me the continent of {country}.",
        "What continent has {country} on it?",
    ),
}

_WORDS = """
stop wait go slow turn park eat drink sleep help fire danger water school farm bridge music train ship market garden
hotel doctor police exit entry tunnel river forest camp beach museum library tower station airport
"""


def _sign_meanings() -> dict[tuple[str, str], str]:
    words = _WORDS.split()
    Random("signs").shuffle(words)
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    return dict(zip(pairs, words, strict=True))


#: Meaning of a sign by (color, shape): 36 words that nothing in the image hints at.
SIGN_MEANINGS: dict[tuple[str, str], str] = _sign_meanings()
