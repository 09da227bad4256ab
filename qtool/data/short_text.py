"""A short English text, for checks that need a text and no data set."""

SHORT_TEXT = """\
A lighthouse keeper writes down the weather four times a day. The book has a column for the direction of the \
wind, one for its strength, one for the height of the barometer, and a wide one for remarks. In the first \
years of the station the remarks were long. The keeper of that time described the colour of the sky at dawn, \
the birds that struck the lantern during the night, and the ships that passed too close to the reef. Later \
keepers wrote less, and the last one, who was replaced by a machine in the autumn of 1981, wrote almost \
nothing at all.

Yet it is his book that the historians like best. On the page for the third of March there is a single line: \
"Fog, horn sounded from two until nine, one answer." Nobody knows who answered. The coast guard had no vessel \
in the area, and the fishing boats of the village lay in the harbour, because the ice had not left the bay. A \
signal that is returned from a cliff arrives after a few seconds and is weaker than the original. The keeper \
knew the echoes of his own horn, since he had listened to them for sixteen winters, and he would not have \
called one of them an answer.

The museum keeps the books in a dry room behind the stairs. Anyone may read them, provided that the hands are \
clean and that no page is photographed with a flash. In 2007 a student of physics copied all readings of the \
barometer into a table, about ninety thousand numbers, and compared them with those of the airport on the \
mainland. The two agree to within one part in a thousand, except for eleven days in 1944, when the instrument \
at the lighthouse had been taken to be repaired and the numbers were guessed. They were guessed well: the \
average error is smaller than the change between one day and the next. The student thanked the keepers by name \
at the end of the thesis, in the order in which they had served.
"""
