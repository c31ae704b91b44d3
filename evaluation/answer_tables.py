"""Tables of the programs that score answers."""

# VQAv2's evaluation program: what is written for what
CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
    'ow'sat='ow's'at 'ows'at='ow's'at I'dve=I'd've Id've=I'd've Im=I'm Ive=I've aint=ain't arent=aren't cant=can't
    couldn'tve=couldn't've couldnt=couldn't couldnt've=couldn't've couldve=could've didnt=didn't doesnt=doesn't
    dont=don't hadn'tve=hadn't've hadnt=hadn't hadnt've=hadn't've hasnt=hasn't havent=haven't he'dve=he'd've
    hed=he'd hed've=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't it'dve=it'd've itd=it'd
    itd've=it'd've itll=it'll let's=let's maam=ma'am mightn'tve=mightn't've mightnt=mightn't mightnt've=mightn't've
    mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
    ow's'at='ow's'at shant=shan't she'dve=she'd've she's=she's shed've=she'd've shouldn'tve=shouldn't've
    shouldnt=shouldn't shouldnt've=shouldn't've shouldve=should've somebody'd=somebodyd somebody'dve=somebody'd've
    somebodyd've=somebody'd've somebodyll=somebody'll somebodys=somebody's someone'dve=someone'd've
    someoned=someone'd someoned've=someone'd've someonell=someone'll someones=someone's
    something'dve=something'd've somethingd=something'd somethingd've=something'd've somethingll=something'll
    thats=that's there'dve=there'd've thered=there'd thered've=there'd've therere=there're theres=there's
    they'dve=they'd've theyd=they'd theyd've=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
    wasnt=wasn't we'dve=we'd've wed've=we'd've werent=weren't weve=we've whatll=what'll whatre=what're whats=what's
    whatve=what've whens=when's whered=where'd wheres=where's whereve=where've who'dve=who'd've whod=who'd
    whod've=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
    wouldn'tve=wouldn't've wouldnt=wouldn't wouldnt've=wouldn't've wouldve=would've y'all'dve=y'all'd've
    y'alld've=y'all'd've y'allll=y'all'll yall=y'all yall'd've=y'all'd've yall'll=y'all'll you'dve=you'd've
    youd=you'd youd've=you'd've youll=you'll youre=you're youve=you've
""".split()
)
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = frozenset(["a", "an", "the"])
PUNCTUATION = list(';/[]"{}()=+\\_-><@`,?!')

# LaVIT's own evaluation: answers that begin so are none
NO_ANSWER = ("i don't know", "i do n't know", "i need to know")
# ... and each of these, in this order, is cut with all before its last occurrence
LEADING_PHRASES = [
    *("it's ", "it is ", "this is ", "that is ", "she's ", "she 's ", "she is ", "he's ", "he 's ", "he is "),
    *("they are ", "they're ", "very ", "for ", "to ", "in ", "on ", "at ", "a ", "an ", "the "),
]

# OK-VQA: words whose stems are no rule's, as open_flamingo 2.0.1 (MIT) found them in its annotations
STEMS = dict(
    pair.split("=")
    for pair in """
    adhesives=adhesive alertness=alert alpes=alp apartments=apart are=are awning=awn backpackers=backpack
    badness=bad baldness=bald bases=base batter's=batter belongings=belong blindness=blind boy's=boy braves=brave
    brightness=bright browsing=brows buildings=build casings=case caves=cave charioteering=chariot
    childrens=children christmas=christmas circuses=circus clothes=cloth clothing=cloth coding=code
    conducter=conduct conferences=confer coniferous=conifer containers=contain controllers=control corgie=corgi
    couponing=coupon creame=cream crepte=crept cumulis=cumuli curiousity=curious dangerous=danger
    daughter's=daughter decorations=decor designers=design dining=dine directions=direct domino's=domino doves=dove
    drives=drive drunkenness=drunken earing=ear earnings=earn eatting=eat electicity=elect electronics=electron
    elevators=elev emirates=emir expressions=express farmer's=farmer firefighters=firefight firefighting=firefight
    glaced=glace gloves=glove gondoliere=gondolier graves=grave haircutting=haircut hamburgers=hamburg hawke=hawk
    hearding=heard hell's=hell hornes=horn illness=ill jeans=jean kid's=kid kindergartener=kindergarten kiting=kite
    las=las leaves=leaf lenses=lens lowes=low markings=mark married=married mating=mate meetings=meet men's=men
    microwaves=microwave minerals=miner mopeds=mope morning=morn mountainous=mountain mustange=mustang
    nationals=nation overseas=oversea oxygenize=oxygen paintings=paint paned=pane paring=pare pease=peas
    personals=person pies=pie piping=pipe plating=plate playfulness=play polarizing=polar police=police
    pooping=poop porche=porch potatoe=potato professionals=profession projections=project propellers=propel
    protesters=protest pudding=pud purring=pure quantas=quanta rabbies=rabbi raines=rain reflections=reflect
    regent's=regent reminders=remind reporters=report revelations=revel riding=ride ringe=ring ripeness=ripe
    rodeoing=rodeo routes=rout sadness=sad sautee=saute scrapbooking=scrapbook settings=set shelves=shelve
    sickness=sick skateboarders=skateboard smugness=smug socializing=social sometimes=sometime staring=stare
    stockings=stock striping=stripe sunbathing=sunbath sunblocker=sunblock suspenders=suspend swining=swine
    teasing=teas teething=teeth tenning=ten tennis=tennis texting=text ties=tie toileting=toilet tomatoe=tomato
    toppings=top transitions=transit travelers=travel travellers=travel urinating=urine vacationing=vacate
    vandalizers=vandal vastness=vast vegas=vegas veteran's=veteran wading=wade walle=wall waves=wave weddings=wed
    wetness=wet wilderness=wilder womens=women yes=yes
""".split()
)
