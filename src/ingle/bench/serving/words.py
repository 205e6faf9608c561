"""Common words, each of which is one token behind a space for most tokenizers."""

from __future__ import annotations

FILLER = "a"
_TEXT = """
the of and to in is was for that it with on as his he be at by this had not are but from or have an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many off before must well back through years much where your way down should because long each
just state those people too how little good world make very year still see work life get here between both being under
never same know another while last might us great old since against go came right used take three states himself few
house use during without again place american around however home small found thought went say part once general high
upon school every does got united left number course war until always away something fact though water less public put
think almost hand enough far took head yet government system better set told nothing night end why called eyes find
going look asked later knew point next city business case group days face young given half room god side social
possible country local need become order door large several power seemed often turned within form along big let best
light kind open ever important white children church body able name line company car feet things full among leave
study love moment real history death service felt true mind hard area money story show reason force table early red
free second word human close art rather wall political common play air clear whole voice sense near woman book sound
black paper music field month party law court film earth stone river hill fire road street train glass window garden
summer winter spring morning evening letter question answer market price value level model data test cause plan rate
cost size type list step game team class board land food blood heart plant tree star sun moon sea wind rain snow ice
gold iron wood bank king queen lord army ship boat horse dog cat bird fish bread milk tea wine salt oil gas north
south east west green blue brown deep wide short tall fast slow strong weak hot cold dry wet dark bright rich poor
safe wild quiet loud soft sweet bitter sharp round flat thin thick heavy empty ready happy sad angry calm walk run
jump swim fly drive ride climb fall rise turn move stop start begin finish write read speak listen watch wait build
break cut burn cook eat drink sleep wake dream learn teach buy sell pay win lose throw catch hold carry pull push
"""
WORDS = tuple(_TEXT.split())
